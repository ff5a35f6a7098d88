"""RMSNorm against its equation: outputs and gradients."""

import pytest
import torch
from torch import nn

from momentum_lm.model.norms import RMSNorm


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(shape, dtype, eps=1e-3):
    """Output and gradients of ours, and of the equation in float64."""
    norm = RMSNorm(shape[-1], eps=eps).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(draw(shape[-1], seed=1))
    results = []
    for exact in (False, True):
        x = draw(*shape, dtype=dtype).to(torch.float64 if exact else dtype).requires_grad_()
        weight = norm.weight.detach().double().requires_grad_() if exact else norm.weight
        y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight if exact else norm(x)
        results.append([y, *torch.autograd.grad(y, [x, weight], draw(*shape, dtype=y.dtype, seed=2))])
    return results


@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 4), (2, 3, 7, 8)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_is_the_equation(shape, dtype, tolerance):
    ours, exact = both(shape, dtype)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_strides_and_frozen_weights():
    norm = RMSNorm(6, eps=1e-5).double().requires_grad_(False)
    x = draw(6, 4, 5).transpose(0, 2).requires_grad_()
    (grad,) = torch.autograd.grad(norm(x).sum(), x)
    plain = nn.RMSNorm(6, eps=1e-5).double()
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_the_own_backward_pass_is_taken_in_training_and_torchs_otherwise():
    norm, x = RMSNorm(4), torch.randn(3, 4, requires_grad=True)
    assert norm(x).grad_fn.name() == "_RMSNormBackward"
    with torch.no_grad():
        torch.testing.assert_close(norm(x), nn.RMSNorm(4, eps=norm.eps)(x))
    x64 = x.detach().double()
    jacobian = torch.func.jacrev(norm.double())(x64)  # torch.func knows no such function
    assert jacobian.shape == (3, 4, 3, 4) and torch.isfinite(jacobian).all()

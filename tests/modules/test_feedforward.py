"""A layer that keeps less gives what the plain expression gives, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from momentum_lm.modules.decoder import ACTIVATIONS
from momentum_lm.modules.feedforward import activated_linear


def tensors(dtype, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 12), (7, 12), (7,), (2, 5, 7)
    *leaves, upstream = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [t.requires_grad_(grad) for t in leaves], upstream


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_outputs_and_gradients_are_those_of_the_plain_expression(name, dtype, tolerance):
    (x, weight, bias), upstream = tensors(dtype)
    plain = F.linear(ACTIVATIONS[name](x), weight, bias)
    ours = activated_linear(x, weight, bias, ACTIVATIONS[name])
    assert torch.equal(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), upstream) for y in (ours, plain)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_autocast_is_followed_and_parameters_get_gradients_in_their_own_precision():
    (x, weight, bias), upstream = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = activated_linear(x.bfloat16(), weight, bias, F.gelu), F.linear(F.gelu(x.bfloat16()), weight, bias)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), upstream.bfloat16()) for y in (ours, plain)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_gradcheck():
    (x, weight, bias), _ = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: activated_linear(*t, F.gelu), (x, weight, bias))


def test_it_keeps_the_input_and_the_weight_alone():
    (x, weight, bias), _ = tensors(torch.float32)
    sizes = []
    for layer in (lambda: activated_linear(x, weight, bias, F.gelu), lambda: F.linear(F.gelu(x), weight, bias)):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            layer()
        sizes.append(sum(kept.values()))
    assert sizes == [x.numel() + weight.numel(), 2 * x.numel() + weight.numel()]

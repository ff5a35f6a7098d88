"""A layer that keeps less gives what the plain expression gives, gradients too."""

import pytest
import torch
import torch.nn.functional as F

from momentum_lm.model.mlp import ACTIVATIONS, activated_linear


def layer(weight, bias):
    """A plain nn.Linear with these very parameters, leaves of the caller."""
    linear = torch.nn.Linear(1, 1)
    linear.weight, linear.bias = (torch.nn.Parameter(t) for t in (weight, bias))
    return linear, (linear.weight, linear.bias)


def tensors(dtype, grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 12), (7, 12), (7,), (2, 5, 7)
    *leaves, upstream = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [t.requires_grad_(grad) for t in leaves], upstream


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_outputs_and_gradients_are_those_of_the_plain_expression(name, dtype, tolerance):
    (x, *weights), upstream = tensors(dtype)
    linear, (weight, bias) = layer(*weights)
    plain = F.linear(ACTIVATIONS[name](x), weight, bias)
    ours = activated_linear(x, linear, ACTIVATIONS[name])
    assert torch.equal(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), upstream) for y in (ours, plain)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_autocast_is_followed_and_parameters_get_gradients_in_their_own_precision():
    (x, *weights), upstream = tensors(torch.float32)
    linear, (weight, bias) = layer(*weights)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = activated_linear(x.bfloat16(), linear, F.gelu), F.linear(F.gelu(x.bfloat16()), weight, bias)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, plain)
    for a, b in zip(
        *(torch.autograd.grad(y, (x, weight, bias), upstream.bfloat16()) for y in (ours, plain)), strict=True
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_gradcheck():
    (x, weight, bias), _ = tensors(torch.float64)

    def compute(x, weight, bias):
        linear = torch.nn.Linear(12, 7)
        for name, tensor in (("weight", weight), ("bias", bias)):
            delattr(linear, name)
            setattr(linear, name, tensor)  # as torch.func.functional_call does
        return activated_linear(x, linear, F.gelu)

    assert torch.autograd.gradcheck(compute, (x, weight, bias))


def kept_by(compute):
    """Elements of the tensors that autograd keeps."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        compute()
    return sum(kept.values())


def test_it_keeps_the_input_and_the_weight_alone():
    (x, *weights), _ = tensors(torch.float32)
    linear, (weight, _) = layer(*weights)
    ours, plain = kept_by(lambda: activated_linear(x, linear, F.gelu)), kept_by(lambda: linear(F.gelu(x)))
    assert [ours, plain] == [x.numel() + weight.numel(), 2 * x.numel() + weight.numel()]


class Doubled(torch.nn.Module):
    """What adapters do: a module in the place of another, with its weight as an attribute."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


def doubled_by_a_hook(linear):
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)


def doubled_by_another_forward(linear):
    stock = linear.forward
    linear.forward = lambda x: 2 * stock(x)


class Twice(torch.nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def doubled_by_parametrizations(linear):
    for name in ("weight", "bias"):
        torch.nn.utils.parametrize.register_parametrization(linear, name, Twice())


@pytest.mark.parametrize(
    "change", [Doubled, doubled_by_a_hook, doubled_by_another_forward, doubled_by_parametrizations]
)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_added_to_the_layer_acts(change, training):
    (x, *weights), _ = tensors(torch.float64)
    linear, (weight, bias) = layer(*weights)
    with torch.set_grad_enabled(training):
        plain = F.linear(F.gelu(x), weight, bias)
        changed = change(linear) or linear
        torch.testing.assert_close(activated_linear(x, changed, F.gelu), 2 * plain)


def test_hooks_on_all_modules_and_backward_hooks_see_the_call():
    (x, *weights), _ = tensors(torch.float64)
    linear, _ = layer(*weights)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
    try:
        activated_linear(x, linear, F.gelu)
    finally:
        handle.remove()
    assert seen == [linear]
    linear.register_full_backward_hook(lambda module, *rest: seen.append("backward"))
    activated_linear(x, linear, F.gelu).sum().backward()
    assert seen == [linear, "backward"]

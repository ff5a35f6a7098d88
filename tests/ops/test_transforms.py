"""torch.func, forward mode, meta tensors, empty batches and graphs for any length: each against the naive form."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from momentum_lm.ops import ema, ema_naive, fir, fir_naive, multi_ema, multi_ema_naive


def with_current(function):
    """A filter of a few taps whose current token has a weight too."""
    return lambda x, weights, state, ids: function(x, weights, state, ids, None, weights[0])


PAIRS = {
    "ema": (ema, ema_naive),
    "multi_ema": (multi_ema, multi_ema_naive),
    "fir": (with_current(fir), with_current(fir_naive)),
}
# Of two rows: the shapes of the values, the decays (of the filter: its weights) and the state
SHAPES = {
    "ema": lambda length: ((2, 2, length, 3), (2,), (2, 2, 3)),
    "multi_ema": lambda length: ((2, length, 4), (4, 8), (2, 4, 8)),
    "fir": lambda length: ((2, 2, length, 3), (5, 2, 3), (2, 2, 5, 3)),
}


@pytest.fixture(
    params=itertools.product(PAIRS, (False, True)), ids=lambda p: f"{p[0]}{'-state-segments' if p[1] else ''}"
)
def case(request):
    """(operator, oracle, inputs(length), the time axis)."""
    name, more = request.param

    def inputs(length):
        draw = torch.Generator().manual_seed(length)
        shape, decays, state = SHAPES[name](length)

        def normal(shape):
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        weight = [normal(decays)] if name == "multi_ema" else []
        ids = (torch.arange(length) // 7).expand(2, length)
        return (
            normal(shape),
            -normal(decays).abs() - 0.05,
            *weight,
            normal(state) if more else None,
            ids if more else None,
        )

    return (*PAIRS[name], inputs, 1 if name == "multi_ema" else 2)


def total(function, others):
    """A scalar of both outputs, as a function of values and decays."""

    def call(values, log_decay):
        out, final = function(values, log_decay, *others)
        return out.sin().sum() + final.cos().sum()

    return call


def test_gradients_and_tangents_of_torch_func(case):
    operator, oracle, inputs, _ = case
    values, decay, *others = inputs(40)
    ours, exact = total(operator, others), total(oracle, others)
    for a, b in zip(grad(ours, (0, 1))(values, decay), grad(exact, (0, 1))(values, decay), strict=True):
        torch.testing.assert_close(a, b)
    tangents = torch.ones_like(values), torch.ones_like(decay)
    expected = jvp(exact, (values, decay), tangents)[1]
    torch.testing.assert_close(jvp(ours, (values, decay), tangents)[1], expected)
    with forward_ad.dual_level():
        out = ours(*(forward_ad.make_dual(x, t) for x, t in zip((values, decay), tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)
    short, _, *others = inputs(5)
    second = [hessian(lambda decay, f=f: total(f, others)(short, decay))(decay) for f in (operator, oracle)]
    torch.testing.assert_close(*second)


def test_vmap_over_values_and_over_decays(case):
    operator, oracle, inputs, _ = case
    values, decay, *others = inputs(40)
    many, rates = torch.stack([values, values * 2]), torch.stack([decay, decay * 2])
    expected = torch.stack([oracle(x, rate, *others)[0] for x, rate in zip(many, rates, strict=True)])
    torch.testing.assert_close(vmap(lambda x, rate: operator(x, rate, *others)[0])(many, rates), expected)
    one = torch.stack([oracle(values, rate, *others)[0] for rate in rates])
    torch.testing.assert_close(vmap(lambda rate: operator(values, rate, *others)[0])(rates), one)


def test_shapes_on_meta_and_of_an_empty_batch(case):
    operator, oracle, inputs, _ = case
    arguments = inputs(40)
    expected = [x.shape for x in oracle(*arguments)]
    assert [x.shape for x in operator(*(None if x is None else x.to("meta") for x in arguments))] == expected
    of_a_row = {0, len(arguments) - 1, len(arguments) - 2}  # values, state and segments
    nobody = [x[:0] if i in of_a_row and x is not None else x for i, x in enumerate(arguments)]
    nobody[0].requires_grad_()
    out, final = operator(*nobody)
    assert [x.shape for x in (out, final)] == [(0, *shape[1:]) for shape in expected]
    (out.sum() + final.sum()).backward()
    assert nobody[0].grad.shape == nobody[0].shape


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_for_any_length(strict, case):
    operator, oracle, inputs, axis = case

    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return operator(*arguments)

    example = inputs(40)
    time = torch.export.Dim("time", min=2, max=4096)
    dynamic = [{axis: time}, *[None] * (len(example) - 2), None if example[-1] is None else {1: time}]
    graph = torch.export.export(Module(), example, dynamic_shapes=(tuple(dynamic),), strict=strict).module()
    for length in (2, 77):
        arguments = inputs(length)
        for ours, exact in zip(graph(*arguments), oracle(*arguments), strict=True):
            torch.testing.assert_close(ours, exact)

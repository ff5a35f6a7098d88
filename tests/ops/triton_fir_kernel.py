"""The kernels of the filter of a few taps against the equation in float64. test_triton.py runs this file; by itself:

TRITON_INTERPRET=1 pytest tests/ops/triton_fir_kernel.py      without a GPU, in Triton's interpreter
pytest tests/ops/triton_fir_kernel.py                         with one, also at the lengths and shapes of training
"""

import pytest
import torch

from momentum_lm import ops
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.ops import fir, fir_naive

pytest.importorskip("triton")
from momentum_lm.ops import triton_fir as kernels
from momentum_lm.ops.triton_fir import fir_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Of an output's own size: half a unit in the last place, or a whole one where the interpreter cuts bfloat16 off instead
# of rounding.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8 if CUDA else 2**-7, torch.float16: 2**-11}
every_dtype = pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda dtype: str(dtype).removeprefix("torch."))


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def runs(batch, length, rate=0.1):
    """Ids of which neighbours differ now and then, and that come back later in other segments."""
    generator = torch.Generator().manual_seed(0)
    return ((torch.rand(batch, length, generator=generator) < rate).cumsum(1) % 3).to(DEVICE)


def naive(x, weights, ids, addend, current):
    return fir_naive(x, weights, None, ids, addend, current)


def outcome(function, x, weights, ids, addend, current, grads):
    """Outputs and all gradients, in float64."""
    results = function(x, weights, ids, addend, current)
    inputs = [t for t in (x, weights, addend, current) if t is not None]
    pairs = [(result, grad.to(result.dtype)) for result, grad in zip(results, grads, strict=True) if grad is not None]
    found = torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [None if t is None else t.detach().double() for t in (*results, *found)]


def check(x, weights, ids=None, addend=None, current=None, grads=None, slack=0.0):
    """``slack``: what else may be wrong, of the largest entry."""
    dtype = x.dtype
    if grads is None:
        grads = draw(*(x if addend is None else addend).shape, dtype=dtype, seed=8), None
    floats = (x, weights, addend, current)
    ours = [None if t is None else t.detach().requires_grad_() for t in floats]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in floats]
    pairs = zip(
        outcome(fir_triton, ours[0], ours[1], ids, *ours[2:], grads),
        outcome(naive, exact[0], exact[1], ids, *exact[2:], grads),
        strict=True,
    )
    for number, (our, their) in enumerate(pairs):
        if their is None:
            assert our is None
            continue
        assert our.shape == their.shape and torch.isfinite(our).all()
        scale = max(their.abs().max().item(), 1e-30)
        excess = (our - their).abs() - ROUNDING[dtype] * their.abs()
        assert excess.max() <= (5e-6 + slack) * scale, (
            f"result {number}: {excess.max() / scale:.1e} of the largest entry"
        )


@every_dtype
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("segments", [False, True])
def test_is_the_equation(dtype, length, segments):
    for taps, dim in ((1, 5), (3, 40), (16, 4)):
        x, addend = (draw(2, 2, length, dim, dtype=dtype, seed=seed) for seed in (0, 1))
        more = (addend, draw(2, dim, seed=3)) if segments else (None, None)
        check(x, draw(taps, 2, dim, seed=2), runs(2, length) if segments else None, *more)


@every_dtype
def test_heads_that_share_inputs(dtype):
    x, addend = draw(2, 3, 70, 8, dtype=dtype), draw(2, 6, 70, 8, dtype=dtype, seed=1)
    slack = 0.0 if dtype == torch.float32 else 8 * ROUNDING[dtype]  # gradients of heads are summed, and rounded then
    check(x, draw(3, 3, 8, seed=2), runs(2, 70), addend, draw(3, 8, seed=3), slack=slack)


def test_the_last_inputs_and_their_gradient():
    for length in (2, 70):
        x = draw(2, 3, length, 8)
        grads = draw(2, 3, length, 8, seed=4), draw(2, 3, 5, 8, seed=5)
        check(x, draw(5, 3, 8, seed=2), runs(2, length), grads=grads)


def test_strides():
    batch, heads, length, dim = 2, 3, 70, 8
    fused = draw(batch, length, 3, heads, dim)[:, :, 2].transpose(1, 2)  # queries, keys and values side by side
    columns = draw(batch, heads, dim, length, seed=1).transpose(2, 3)
    one = draw(1, heads, 1, dim, seed=2).expand(batch, -1, length, -1)
    ids = runs(batch, 2 * length)[:, ::2]
    for x, addend in ((fused, columns), (columns, one), (one, fused)):
        check(x, draw(3, heads, dim, seed=3), ids, addend, grads=(columns, None))


@every_dtype
def test_a_segment_is_blind_to_those_around_it_bit_for_bit(dtype):
    ids = (torch.arange(150, device=DEVICE) >= 71).long()[None] + (torch.arange(150, device=DEVICE) >= 100)
    x, grad = draw(1, 2, 150, 8, dtype=dtype), draw(1, 2, 150, 8, dtype=dtype, seed=1)
    results = []
    for change in (False, True):
        v, g = x.clone(), grad.clone()
        if change:
            v[:, :, :71] = v[:, :, 100:] = float("nan")
            g[:, :, :71] = g[:, :, 100:] = float("nan")
        v.requires_grad_()
        out, _ = fir_triton(v, draw(4, 2, 8, seed=2), ids)
        results.append((out[:, :, 71:100], torch.autograd.grad(out, v, g)[0][:, :, 71:100]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_other_precisions_of_weights():
    x, weights, current = draw(1, 2, 20, 8).bfloat16(), draw(3, 2, 8).double(), draw(2, 8).bfloat16()
    leaves = [t.requires_grad_() for t in (x, weights, current)]
    out, _ = fir_triton(x, weights, None, None, current)
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)] == [t.dtype for t in leaves]


@pytest.mark.filterwarnings("ignore")  # of what torch.compile does
def test_blocks_of_a_decoder_compile_without_graph_breaks(monkeypatch):
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(50, 24, 32, 1, 3, max_positions=80, momentum_kind="fir", momentum_at="output,keys,ffn_hidden")
    ).to(DEVICE)
    tokens = torch.randint(4, 50, (2, 70), device=DEVICE)
    results = []
    for kernel in (False, True):
        if kernel:
            decoder.layers[0].compile(fullgraph=True, backend="inductor" if CUDA else "aot_eager")
        monkeypatch.setattr(ops, "_has_kernel", lambda *_, kernel=kernel: kernel)
        loss = decoder(tokens).square().mean()
        results.append([loss, *torch.autograd.grad(loss, list(decoder.parameters()))])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_operators_are_what_they_say_they_are():
    """torch's own checks: no hidden writes, shapes and strides known without running."""
    x, weights, current = draw(2, 40, 3, 8).transpose(1, 2), draw(3, 3, 8), draw(3, 8, seed=1)
    leaves = [t.requires_grad_() for t in (x, weights, current)]
    torch.library.opcheck(kernels._forward, (leaves[0], leaves[1], runs(2, 40), x.detach(), leaves[2]))


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@needs_gpu
def test_the_public_function_takes_the_kernel():
    x, weights = draw(1, 3, 70, 8).requires_grad_(), draw(3, 3, 8)
    assert "momentum_lm_fir" in fir(x, weights)[0].grad_fn.name()
    assert "_FIR" in fir(x, weights, draw(1, 3, 3, 8))[0].grad_fn.name()  # with a state


@needs_gpu
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("batch,heads,length,dim", [(8, 16, 2048, 64), (3, 25, 1023, 80)])
def test_shapes_of_training(batch, heads, length, dim, segments):
    x, addend = (draw(batch, length, heads, dim, dtype=torch.bfloat16, seed=s).transpose(1, 2) for s in (0, 1))
    ids = runs(batch, length, 0.002) if segments else None
    check(x, draw(3, heads, dim, seed=2), ids, addend, draw(heads, dim, seed=3), slack=1e-4)

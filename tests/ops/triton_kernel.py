"""The fused kernels against the equation in float64. test_triton.py runs this file; by itself:

TRITON_INTERPRET=1 pytest tests/ops/triton_kernel.py      without a GPU, in Triton's interpreter: hundreds of tokens
pytest tests/ops/triton_kernel.py                         with one, also at the lengths and shapes of training
"""

import pytest
import torch

from momentum_lm import ops
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.ops import ema, ema_naive
from momentum_lm.ops.chunked import ema_chunked

pytest.importorskip("triton")
from momentum_lm.ops import triton as kernels
from momentum_lm.ops.triton import ema_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DECAYS = [1e-4, 0.6, 0.999]
# Of an output's own size: half a unit in the last place, or a whole one where the interpreter cuts bfloat16 off instead
# of rounding.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8 if CUDA else 2**-7, torch.float16: 2**-11}
# Of the largest entry: fp32 sums, weights in two halves, and a GPU's approximate powers, whose errors add up over a
# long memory.
SUMS = {torch.float32: 2e-5 if CUDA else 5e-6, torch.bfloat16: 1e-4, torch.float16: 2e-5}

every_dtype = pytest.mark.parametrize("dtype", list(SUMS), ids=lambda dtype: str(dtype).removeprefix("torch."))


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def runs(batch, length, rate=0.05, seed=0):
    """Ids of which neighbours differ now and then, and that come back later in other segments."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(batch, length, generator=generator) < rate).cumsum(1) % 3).to(DEVICE)


def decays(values=DECAYS, dtype=torch.float32):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE).log().to(dtype)


def leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def outcome(function, values, log_decay, state, addend, ids, grad_out, grad_final):
    """Outputs and all gradients, in float64."""
    out, final = function(values, log_decay, state, ids, addend)
    inputs = [t for t in (values, log_decay, state, addend) if t is not None and t.requires_grad]
    pairs = [(o, g) for o, g in ((out, grad_out), (final, grad_final)) if g is not None]
    gradients = torch.autograd.grad([o for o, _ in pairs], inputs, [g.to(o.dtype) for o, g in pairs], allow_unused=True)
    return [None if t is None else t.detach().double() for t in (out, final, *gradients)]


def check(
    values, log_decay, state=None, addend=None, ids=None, grad_out=None, grad_final=None, oracle=ema_naive, slack=0.0
):
    """``slack``: what else may be wrong, of the largest entry."""
    dtype = values.dtype
    arguments = leaves(values, log_decay, state, addend)
    exact = leaves(*(None if t is None else t.double() for t in (values, log_decay, state, addend)))
    ours = outcome(ema_triton, *arguments, ids, grad_out, grad_final)
    theirs = outcome(oracle, *exact, ids, grad_out, grad_final)
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if their is None:
            assert our is None
            continue
        assert torch.isfinite(our).all()
        scale = max(their.abs().max().item(), 1e-30)
        excess = (our - their).abs() - ROUNDING[dtype] * their.abs()
        assert excess.max() <= (SUMS[dtype] + slack) * scale, (
            f"result {number}: {excess.max() / scale:.1e} of the largest entry"
        )


@every_dtype
@pytest.mark.parametrize("state,segments", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("length", [1, 33, 64, 130] + ([1000, 8192] if CUDA else []))
def test_is_the_equation(dtype, state, segments, length):
    batch, heads, dim = 2, len(DECAYS), 32
    check(
        draw(batch, heads, length, dim, dtype=dtype),
        decays(),
        draw(batch, heads, dim, seed=1) if state else None,
        draw(batch, heads, length, dim, dtype=dtype, seed=2) if state == segments else None,
        runs(batch, length) if segments else None,
        draw(batch, heads, length, dim, dtype=dtype, seed=3),
        draw(batch, heads, dim, seed=4) if state else None,
        ema_naive if length < 1000 else ema_chunked,
    )


@every_dtype
@pytest.mark.parametrize("shared", [2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_heads_that_share_values(dtype, shared, learned):
    """Attention's heads h n to h n + n - 1 get the average of the values' head h."""
    batch, heads, length, dim = 2, len(DECAYS), 70, 16
    values, state = draw(batch, heads, length, dim, dtype=dtype), draw(batch, heads, dim, seed=1)
    addend, grad = (draw(batch, shared * heads, length, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    check(
        values.requires_grad_(),
        decays(),
        state if learned else None,
        addend,
        runs(batch, length) if learned else None,
        grad,
        draw(batch, heads, dim, seed=4) if learned else None,
        slack=0.0 if dtype == torch.float32 else 8 * ROUNDING[dtype],  # gradients of heads are summed, and rounded then
    )


@pytest.mark.parametrize("dim", [1, 16, 64, 80, 96, 128, 160, 256])
def test_head_sizes(dim):
    shape = (1, 1, 70, dim)
    values, addend, grad = (draw(*shape, dtype=torch.float16, seed=seed) for seed in range(3))
    check(values, decays([0.9]), None, addend, runs(1, 70), grad, draw(1, 1, dim, seed=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype):
    batch, heads, length, dim = 2, 3, 40, 16
    fused = draw(batch, length, 3, heads, dim, dtype=dtype)  # queries, keys and values side by side
    columns = draw(batch, heads, dim, length, dtype=dtype, seed=1).transpose(2, 3)
    one = draw(1, heads, 1, dim, dtype=dtype, seed=2).expand(batch, -1, length, -1)
    every_other = draw(batch, heads, 2 * length, dim, dtype=dtype, seed=3)[:, :, ::2]
    ids = runs(batch, 2 * length)[:, ::2]
    views = [fused[:, :, 2].transpose(1, 2), columns, one, every_other]
    for shift in range(4):
        values, addend, grad = (views[(shift + i) % 4] for i in range(3))
        check(values, decays(), None, addend, ids, grad)
    out, _ = ema_triton(views[0], decays(), None, None, views[0])
    assert out.stride() == (
        length * heads * dim,
        dim,
        heads * dim,
        1,
    )  # heads side by side, as the output projection wants them


def test_gradient_of_a_sum_comes_without_strides():
    values, log_decay, addend = leaves(draw(1, 3, 70, 8), decays(), draw(1, 3, 70, 8, seed=1))
    ema_triton(values, log_decay, None, None, addend)[0].sum().backward()
    exact = leaves(values.double(), log_decay.double())
    ema_naive(*exact)[0].sum().backward()
    torch.testing.assert_close(values.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_decay.grad.double(), exact[1].grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(addend.grad, torch.ones_like(addend))


@pytest.mark.parametrize("which", ["output", "state"])
def test_one_of_both_results_is_used(which):
    grads = (draw(1, 3, 70, 8, seed=1), None) if which == "output" else (None, draw(1, 3, 8, seed=1))
    check(draw(1, 3, 70, 8), decays(), draw(1, 3, 8, seed=2), draw(1, 3, 70, 8, seed=3), runs(1, 70), *grads)


def test_no_gradient_that_nobody_asked_for():
    values, log_decay, addend = draw(1, 3, 70, 8), decays(), draw(1, 3, 70, 8, seed=1)
    out, final = ema_triton(values, log_decay, None, None, addend)
    assert not out.requires_grad and not final.requires_grad
    out, _ = ema_triton(values, log_decay.requires_grad_(), None, None, addend)
    (grad,) = torch.autograd.grad(out.sum(), log_decay)
    exact = decays(dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(ema_naive(values.double(), exact)[0].sum(), exact)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_decay_and_state_of_other_precisions():
    values, log_decay, state = (
        draw(1, 3, 70, 8, dtype=torch.bfloat16),
        decays(dtype=torch.float64),
        draw(1, 3, 8).bfloat16(),
    )
    check(values, log_decay, state, None, runs(1, 70).to(torch.int32), draw(1, 3, 70, 8, dtype=torch.bfloat16, seed=1))
    inputs = leaves(values, log_decay, state)
    grads = torch.autograd.grad(ema_triton(*inputs)[0].float().sum(), inputs)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float64, torch.bfloat16]


@every_dtype
def test_a_segment_is_blind_to_those_around_it_bit_for_bit(dtype):
    """Forward to the one before, backward to the one after."""
    ids = (torch.arange(150, device=DEVICE) >= 71).long()[None] + (torch.arange(150, device=DEVICE) >= 100)
    values, grad = draw(1, 3, 150, 8, dtype=dtype), draw(1, 3, 150, 8, dtype=dtype, seed=1)
    results = []
    for change in (False, True):
        v, g = values.clone(), grad.clone()
        if change:
            v[:, :, :71] = v[:, :, 100:] = 50.0
            g[:, :, :71] = g[:, :, 100:] = -50.0
        v.requires_grad_()
        out, _ = ema_triton(v, decays(), None, ids)
        results.append((out[:, :, 71:100], torch.autograd.grad(out, v, g)[0][:, :, 71:100]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_state_splits_a_sequence_anywhere():
    values, log_decay, state = draw(2, 3, 101, 8), decays(), draw(2, 3, 8, seed=1)
    whole, final = ema_triton(values, log_decay, state)
    for cut in (1, 32, 50, 100):
        first, middle = ema_triton(values[:, :, :cut], log_decay, state)
        second, last = ema_triton(values[:, :, cut:], log_decay, middle)
        torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, final, rtol=1e-5, atol=1e-5)


def test_more_elements_than_32_bits_count():
    """Strides that fit, and steps of them that do not. Only the few pages that are touched become memory."""
    far = 2**30 + 64
    storage = torch.empty(2 * far + 64, dtype=torch.float16, device=DEVICE)
    for shape, strides in [
        ((3, 1, 2, 8), (far, 8, 8, 1)),
        ((1, 3, 2, 8), (8, far, 8, 1)),
        ((1, 2, 3, 8), (8, 8, far, 1)),
    ]:
        values = storage.as_strided(shape, strides).copy_(draw(*shape))
        check(values, decays([0.9] * shape[1]), None, values, None, values)


def test_autocast_changes_nothing():
    arguments = (draw(1, 3, 70, 8), decays(), draw(1, 3, 8, seed=1))
    plain = ema_triton(*arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = ema_triton(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_the_addend_is_not_touched_and_its_gradient_not_copied():
    values, addend = leaves(draw(1, 3, 70, 8), draw(1, 3, 70, 8, seed=1))
    before = addend.detach().clone()
    out, _ = ema_triton(values, decays(), None, None, addend)
    assert torch.equal(addend, before) and out.data_ptr() != addend.data_ptr()
    grad = draw(1, 3, 70, 8, seed=2)
    assert torch.autograd.grad(out, addend, grad)[0].data_ptr() == grad.data_ptr()


def saved_elements(learned, length=640):
    saved = []
    values, log_decay = draw(1, 3, length, 8).requires_grad_(), decays().requires_grad_(learned)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ema_triton(values, log_decay, None, None, values)
    return sum(saved), values.numel()


def test_values_are_kept_only_for_a_learned_decay():
    saved, _ = saved_elements(False)
    assert saved == 3
    saved, values = saved_elements(True)
    assert values < saved <= 1.1 * values


def test_once_differentiable():
    values, log_decay = leaves(draw(1, 3, 20, 8), decays())
    (grad,) = torch.autograd.grad(ema_triton(values, log_decay)[0].square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore")  # of what torch.compile does
@pytest.mark.parametrize("learned", [False, True])
def test_compiles_without_graph_breaks(learned):
    def block(x, log_decay, state, ids):
        values = x.unflatten(-1, (3, -1)).transpose(1, 2)
        out, final = ema_triton(values, log_decay, state, ids, values.relu())
        return out.transpose(1, 2).flatten(2).tanh().sum() + final.square().sum()

    arguments = [*leaves(draw(2, 70, 24), decays(), draw(2, 3, 8, seed=1)), runs(2, 70)]
    arguments[1].requires_grad_(learned)
    inputs = [t for t in arguments[:3] if t.requires_grad]
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    results = [[loss := f(*arguments), *torch.autograd.grad(loss, inputs)] for f in (block, compiled)]
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of what torch.compile does
@pytest.mark.parametrize(
    "options", [{}, {"momentum_learned": True}, {"momentum_normalize": True, "momentum_gate": "zero"}]
)
def test_blocks_of_a_decoder_compile_without_graph_breaks(options, monkeypatch):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(50, 24, 32, 1, 3, max_positions=80, momentum_kind="ema", **options)).to(DEVICE)
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


@pytest.mark.parametrize("learned", [False, True])
def test_operators_are_what_they_say_they_are(learned):
    """torch's own checks: no hidden writes, shapes and strides known without running."""
    values, log_decay = leaves(draw(2, 40, 3, 8).transpose(1, 2), decays())
    log_decay.requires_grad_(learned)
    torch.library.opcheck(kernels._forward, (values, log_decay, draw(2, 3, 8), runs(2, 40), values.detach(), learned))


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")


@needs_gpu
def test_the_public_function_takes_the_kernel():
    values = draw(1, 3, 70, 8).requires_grad_()
    assert "momentum_lm_ema" in ema(values, decays())[0].grad_fn.name()
    assert "_EMA" in ema(values.double(), decays())[0].grad_fn.name()
    wide, ids = draw(2, 3, 1000, 8, dtype=torch.float64), runs(2, 1000)
    pairs = zip(ema(wide, decays(), None, ids), ema_naive(wide, decays(), None, ids), strict=True)
    assert all(((ours - oracle).abs() <= 1e-12 * oracle.abs().max()).all() for ours, oracle in pairs)


@needs_gpu
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(
    "batch,heads,length,dim", [(8, 16, 2048, 64), (4, 32, 2048, 128), (2, 16, 8192, 64), (3, 25, 1023, 80)]
)
def test_shapes_of_training(batch, heads, length, dim, segments, learned):
    def make(seed):
        return draw(batch, length, heads, dim, dtype=torch.bfloat16, seed=seed).transpose(1, 2)

    log_decay = decays([0.9 + 0.0999 * h / heads for h in range(heads)])
    values, addend, grad = make(0), make(1), make(2)
    ids = runs(batch, length, 0.002) if segments else None
    if learned:
        check(values, log_decay, None, addend, ids, grad, None, ema_chunked)
        return
    v = values.detach().requires_grad_()
    out, _ = ema_triton(v, log_decay, None, ids, addend)
    exact, _ = ema_chunked(values.double(), log_decay.double(), None, ids, addend.double())
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4 * exact.abs().max()).all()
    (ours,) = torch.autograd.grad(out, v, grad)
    w = values.double().requires_grad_()
    (theirs,) = torch.autograd.grad(ema_chunked(w, log_decay.double(), None, ids)[0], w, grad.double())
    assert ((ours.double() - theirs).abs() <= 2**-8 * theirs.abs() + 1e-4 * theirs.abs().max()).all()

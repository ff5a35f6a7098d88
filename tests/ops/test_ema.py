"""Every implementation of the EMA against the equation, outputs and gradients."""

import pytest
import torch

from momentum_lm.ops import ema, ema_naive

LENGTHS = [1, 2, 31, 32, 33, 64, 1000]
DECAYS = [0.01, 0.5, 0.9, 0.999]


def random_segments(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.rand(batch, length, generator=generator) < 0.05
    return starts.cumsum(1)


def inputs(batch, heads, length, dim, eta, state, segments, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    spread = torch.linspace(0.9, 1.1, heads, dtype=torch.float64)  # each head its own decay, around eta
    log_decay = (torch.tensor(eta, dtype=torch.float64).log() * spread).requires_grad_()
    initial = (
        torch.randn(batch, heads, dim, generator=generator, dtype=torch.float64).requires_grad_() if state else None
    )
    ids = random_segments(batch, length, generator) if segments else None
    return values, log_decay, initial, ids


KINDS = [(False, False), (True, False), (False, True), (True, True)]
LONG = [  # of 4,096 tokens, of which the extremes will do by day
    pytest.param(
        4096,
        eta,
        *kind,
        marks=() if (eta, *kind) in {(0.999, True, True), (0.01, False, False)} else pytest.mark.nightly,
    )
    for eta in DECAYS
    for kind in KINDS
]


@pytest.mark.parametrize(
    "length,eta,state,segments", [*((n, eta, *kind) for kind in KINDS for n in LENGTHS for eta in DECAYS), *LONG]
)
def test_chunked_is_the_equation_in_float64(length, eta, state, segments):
    batch, heads, dim = (2, 2, 3) if length <= 1000 else (1, 2, 2)
    arguments = inputs(batch, heads, length, dim, eta, state, segments)
    leaves = [a for a in arguments[:3] if a is not None]
    generator = torch.Generator().manual_seed(1)
    g_out = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
    g_state = torch.randn(batch, heads, dim, generator=generator, dtype=torch.float64)
    results = []
    for function in (ema, ema_naive):
        out, final = function(*arguments)
        gradients = torch.autograd.grad((out * g_out).sum() + (final * g_state).sum(), leaves)
        results.append([out, final, *gradients])
    for ours, oracle in zip(*results, strict=True):
        scale = oracle.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, oracle / scale, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("eta", DECAYS)
def test_low_precision_is_the_exact_result_rounded(dtype, tolerance, eta):
    values, log_decay, _, _ = inputs(2, 3, 500, 8, eta, False, False, dtype)
    out, final = ema(values, log_decay.detach().float())
    exact, exact_final = ema_naive(values.detach().double(), log_decay.detach().float().double())
    assert out.dtype == dtype and final.dtype == torch.float32
    scale = exact.detach().abs().amax()
    assert ((out.double() - exact).abs() <= tolerance * exact.abs() + 2e-6 * scale).all()
    torch.testing.assert_close(final.double(), exact_final, rtol=1e-5, atol=1e-5 * scale.item())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2**-8)])
def test_addend(dtype, tolerance):
    """Added before rounding, to a buffer of its own, whatever its precision; the gradient is that of the sum."""
    values, log_decay, initial, ids = inputs(2, 2, 70, 3, 0.999, True, True, dtype)
    log_decay, initial = log_decay.detach(), initial.detach()
    addend = (
        torch.randn(2, 2, 70, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    before = addend.detach().clone()
    out, final = ema(values, log_decay, initial, ids, addend)
    exact, exact_final = ema_naive(values.double(), log_decay, initial, ids, addend.double())
    assert out.dtype == dtype and torch.equal(addend, before)
    sums = 1e-12 if dtype == torch.float64 else 1e-5
    assert ((out.double() - exact).abs() <= tolerance * exact.abs() + sums * exact.abs().max()).all()
    torch.testing.assert_close(final.double(), exact_final, rtol=sums, atol=sums)
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, addend, grad, retain_graph=True)[0], grad)
    wide = addend.detach().double()
    assert ema(values, log_decay, initial, ids, wide)[0].dtype == torch.float64


@pytest.mark.parametrize("length", [1, 33, 70])
@pytest.mark.parametrize("state,segments", KINDS)
def test_heads_that_share_values_get_the_average_of_their_group(length, state, segments):
    """As with values repeated for each head, outputs and gradients; by both implementations."""
    values, log_decay, initial, ids = inputs(2, 2, length, 3, 0.9, state, segments)
    generator = torch.Generator().manual_seed(1)
    addend, g_out = (torch.randn(2, 6, length, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    addend.requires_grad_()
    g_state = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    leaves = [a for a in (values, log_decay, initial, addend) if a is not None]
    results = []
    for function in (ema, ema_naive):
        out, final = function(values, log_decay, initial, ids, addend)
        results.append([out, final, *torch.autograd.grad((out * g_out).sum() + (final * g_state).sum(), leaves)])
    average, final = ema_naive(values, log_decay, initial, ids)
    out = torch.stack([average[:, head // 3] for head in range(6)], 1) + addend
    results.append([out, final, *torch.autograd.grad((out * g_out).sum() + (final * g_state).sum(), leaves)])
    for one in results[:2]:
        for ours, oracle in zip(one, results[2], strict=True):
            torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-11)


def test_sums_for_heads_that_share_values_are_rounded_once():
    values, log_decay, _, _ = inputs(1, 2, 60, 8, 0.9, False, False, torch.bfloat16)
    addend = torch.randn(1, 4, 60, 8).bfloat16()
    out, _ = ema(values.detach(), log_decay.detach(), addend=addend)
    exact, _ = ema_naive(values.detach().double(), log_decay.detach(), addend=addend.double())
    assert out.dtype == torch.bfloat16
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_equal_ids_in_two_places_are_two_segments():
    """Whether they lie in one chunk or chunks apart; ids that never repeat say the same."""
    for lengths in ([5, 7, 9], [40, 40, 70], [1, 64, 1, 30]):
        values, log_decay, initial, _ = inputs(1, 2, sum(lengths), 3, 0.99, True, False)
        again = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)])[None]
        once = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
        for function in (ema, ema_naive):
            for ours, expected in zip(
                function(values, log_decay, initial, again), function(values, log_decay, initial, once), strict=True
            ):
                assert torch.equal(ours, expected)
        start = 0
        for n in lengths:
            alone, _ = ema_naive(values[:, :, start : start + n], log_decay, initial if start == 0 else None)
            torch.testing.assert_close(
                ema(values, log_decay, initial, again)[0][:, :, start : start + n], alone, rtol=0, atol=1e-12
            )
            start += n


def test_autocast_leaves_the_sums_in_fp32():
    values, log_decay, _, _ = inputs(1, 2, 300, 4, 0.999, False, False, torch.float32)
    log_decay = log_decay.detach().float()
    plain = ema(values, log_decay)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ema(values, log_decay)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


@pytest.mark.parametrize("segments", [False, True])
def test_state_splits_a_sequence_anywhere(segments):
    values, log_decay, initial, ids = inputs(2, 2, 101, 3, 0.9, True, segments)
    whole, final = ema(values, log_decay, initial, ids)
    for cut in (1, 32, 50, 100):
        if ids is not None:
            ids[:, cut] = ids[:, cut - 1]  # a state belongs to the segment that goes on
            ids[:, cut + 1 :] = ids[:, cut + 1 :].clamp(min=int(ids[:, cut].max()))
            whole, final = ema(values, log_decay, initial, ids)
        first, state = ema(values[:, :, :cut], log_decay, initial, None if ids is None else ids[:, :cut])
        second, last = ema(values[:, :, cut:], log_decay, state, None if ids is None else ids[:, cut:])
        torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(last, final, rtol=0, atol=1e-12)


def test_a_segment_is_blind_to_the_one_before_it_bit_for_bit():
    values, log_decay, _, _ = inputs(1, 2, 90, 4, 0.99, False, False, torch.float32)
    ids = (torch.arange(90) >= 41).long()[None]
    changed = values.detach().clone()
    changed[:, :, :41] = 100 * torch.randn(1, 2, 41, 4)
    log_decay = log_decay.detach().float()
    assert torch.equal(
        ema(values, log_decay, None, ids)[0][:, :, 41:], ema(changed, log_decay, None, ids)[0][:, :, 41:]
    )


def test_no_token_sees_itself_or_the_future():
    values, log_decay, _, _ = inputs(1, 1, 70, 2, 0.5, False, False)
    out, _ = ema(values, log_decay)
    for t in (0, 1, 31, 32, 33, 69):
        (gradient,) = torch.autograd.grad(out[:, :, t].sum(), values, retain_graph=True)
        assert (gradient[:, :, t:] == 0).all() and (t == 0 or (gradient[:, :, t - 1] != 0).all())


@pytest.mark.parametrize("segments", [False, True])
def test_strides_do_not_matter(segments):
    values, log_decay, initial, ids = inputs(2, 3, 65, 4, 0.7, True, segments)
    strided = values.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(
        ema(strided, log_decay, initial, ids)[0], ema(values, log_decay, initial, ids)[0], rtol=0, atol=0
    )


def test_gradcheck():
    values, log_decay, initial, ids = inputs(1, 2, 5, 2, 0.6, True, True)
    assert torch.autograd.gradcheck(lambda v, d, s: ema(v, d, s, ids), (values, log_decay, initial))


def test_only_inputs_are_saved_for_the_backward_pass():
    """Memory: what autograd keeps is the values themselves, at any length."""
    for length in (64, 640):
        saved = []
        values, log_decay, _, _ = inputs(1, 2, length, 4, 0.9, False, False, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            ema(values, log_decay.detach().float())
        assert sum(saved) == values.numel() + 2


@pytest.mark.parametrize("state,segments", [(False, False), (True, True)])
def test_no_tensor_grows_faster_than_the_sequence(state, segments, largest_tensor):
    """Outputs and gradients of the values, the decay and the state; a T x T matrix would be 256 times as large at the
    second length.
    """
    sizes = []
    for length in (256, 4096):
        values, log_decay, initial, ids = inputs(1, 2, length, 2, 0.9, state, segments, torch.float32)
        with largest_tensor() as largest:
            out, final = ema(values, log_decay, initial, ids)
            (out.square().sum() + final.square().sum()).backward()
        assert log_decay.grad is not None
        sizes.append(largest.size)
    assert sizes[1] <= 16 * sizes[0] < 4096 * 4096


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda v, d, s, i: (v[0], d, s, i), "values"),
        (lambda v, d, s, i: (v[:, :, :0], d, s, i), "values"),
        (lambda v, d, s, i: (v, d[:1], s, i), "log_decay"),
        (lambda v, d, s, i: (v, d.bfloat16(), s, i), "float32"),
        (lambda v, d, s, i: (v, d, s[:, :1], i), "initial_state"),
        (lambda v, d, s, i: (v, d, s, i[:, 1:]), "segment_ids"),
        (lambda v, d, s, i: (v, d, s, i, v[:1]), "addend"),
    ],
)
def test_wrong_arguments_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        ema(*change(*inputs(2, 2, 6, 3, 0.5, True, True)))

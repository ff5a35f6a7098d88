"""Every implementation of the filter of a few taps against the equation, outputs and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from momentum_lm.ops import ema, fir, fir_naive, shifted

LENGTHS, TAPS = [1, 2, 3, 5, 17, 100], [1, 2, 3, 16, 40]
KINDS = [(False, False), (True, False), (False, True), (True, True)]
FORMS = {"shifted": lambda x, taps, segments: False, "convolution": lambda x, taps, segments: not segments}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Whatever the size and the dtype, this form is taken."""
    monkeypatch.setattr(shifted, "_convolves", FORMS[request.param])
    return request.param


def inputs(length, taps, state, segments, dtype=torch.float64, shape=(2, 2, 3), shared=1):
    """x, weights, initial state, segments, addend, current."""
    batch, heads, dim = shape
    draw = torch.Generator().manual_seed(length * taps)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    return (
        normal(batch, heads, length, dim),
        normal(taps, heads, dim),
        normal(batch, heads, taps, dim) if state else None,
        (torch.rand(batch, length, generator=draw) < 0.1).cumsum(1) if segments else None,
        normal(batch, shared * heads, length, dim),
        normal(heads, dim),
    )


def outputs_and_gradients(function, arguments):
    """What comes back of gradients that half precision can hold."""
    results = function(*arguments)
    leaves = [a for a in arguments if a is not None and a.requires_grad]
    draw = torch.Generator().manual_seed(1)
    grads = [torch.randint(-8, 9, part.shape, generator=draw).to(part.dtype) / 8 for part in results]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("state,segments", KINDS)
@pytest.mark.parametrize("shared", [1, 2])
def test_each_form_is_the_equation_in_float64(form, length, taps, state, segments, shared):
    arguments = inputs(length, taps, state, segments, shared=shared)
    for more in (arguments, (*arguments[:4], None, None)):
        for ours, oracle in zip(*(outputs_and_gradients(f, more) for f in (fir, fir_naive)), strict=True):
            torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


def test_the_equation_is_a_grouped_convolution():
    x, weights, _, _, _, current = inputs(50, 7, False, False)
    kernel = torch.cat([current[None], weights]).flip(0).flatten(1).T[:, None]  # (H D, 1, K + 1)
    expected = F.conv1d(F.pad(x.transpose(2, 3).flatten(1, 2), (7, 0)), kernel, groups=6)
    out, _ = fir_naive(x, weights, current=current)
    torch.testing.assert_close(out, expected.unflatten(1, (2, 3)).transpose(2, 3))


def test_decaying_weights_are_the_moving_average():
    """Its state is what the weights make of ours."""
    eta, taps = 0.3, 40
    x = torch.randn(2, 3, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = (eta ** torch.arange(1, taps + 1, dtype=torch.float64))[:, None, None].expand(taps, 3, 4)
    average, state = ema(x, torch.full((3,), eta, dtype=torch.float64).log())
    out, last = fir(x, weights)
    torch.testing.assert_close(out, average, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.einsum("khd,bhkd->bhd", weights.flip(0), last), state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 10])
def test_the_state_is_the_last_inputs_the_oldest_first(length):
    x, weights, initial, *_ = inputs(length, 3, True, False)
    for before in (torch.zeros_like(initial), initial):
        _, last = fir(x, weights, None if before is not initial else initial)
        assert torch.equal(last, torch.cat([before, x], 2)[:, :, -3:])
    _, last = fir(x, weights, initial, torch.arange(length).expand(2, -1))  # every token a segment
    assert torch.equal(last[:, :, -1], x[:, :, -1])
    assert (last[:, :, :-1] == 0).all() or length == 1


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2e-6)])
@pytest.mark.parametrize("taps,shape", [(3, (2, 2, 3)), (16, (2, 2, 64))])
def test_low_precision_is_the_exact_result_rounded(dtype, tolerance, taps, shape):
    """The second ones are computed by convolution, in single precision and in half."""
    arguments = inputs(500, taps, True, False, dtype, shape)
    assert shifted._convolves(arguments[0].float().transpose(1, 2), taps, False) == (taps == 16)
    doubles = [a if a is None else a.detach().double().requires_grad_() for a in arguments]
    exact, ours = outputs_and_gradients(fir_naive, doubles), outputs_and_gradients(fir, arguments)
    assert [a.dtype for a in ours] == [dtype] * len(ours)
    for a, b in zip(ours, exact, strict=True):
        assert ((a.double() - b).abs() <= tolerance * b.abs() + 2e-6 * b.abs().max()).all()
    assert torch.equal(ours[1], arguments[0][:, :, -taps:])


def test_the_form_goes_by_taps_and_size():
    """A convolution of float64 is slow on a CPU, and none stops at the end of a segment."""
    few, many = torch.zeros(2, 100, 2, 3), torch.zeros(4, 1024, 2, 64)
    chosen = [shifted._convolves(x, taps, False) for x in (few, many) for taps in (1, 2, 3, 16)]
    assert chosen == [False, False, False, True, False, True, True, True]
    assert not any(
        shifted._convolves(*a) for a in ((many, 16, True), (many.double(), 16, False), (many[:, :1], 16, False))
    )


def test_precisions_can_be_mixed():
    x, weights, initial, _, addend, current = inputs(20, 4, True, False)
    mixed = (x.bfloat16(), weights.float(), initial.float(), None, addend.half(), current.bfloat16())
    out, last = fir(*mixed)
    exact, _ = fir_naive(*(a if a is None else a.double() for a in mixed))
    assert out.dtype == torch.float16 and last.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("shared", [1, 3])
def test_addend(dtype, tolerance, shared):
    """Added before rounding, to a buffer of its own; the gradient is that of the sum itself."""
    arguments = inputs(70, 3, True, True, dtype, shared=shared)
    addend = arguments[4]
    before = addend.detach().clone()
    out, _ = fir(*arguments)
    exact, _ = fir_naive(*(a.double() if a is not None and a.is_floating_point() else a for a in arguments))
    assert out.dtype == dtype and torch.equal(addend, before)
    assert ((out.double() - exact).abs() <= tolerance * exact.abs() + 1e-6).all()
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, addend, grad)[0], grad)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("cuts", [[1], [2, 3], [50], [99], [1, 2, 3, 4, 5], [30, 60, 61]])
def test_states_join_pieces_to_the_whole(form, segments, cuts):
    x, weights, initial, ids, _, current = inputs(100, 4, True, segments)
    whole, final = fir_naive(x, weights, initial, ids, None, current)
    outs, state = [], initial
    for start, end in itertools.pairwise([0, *cuts, 100]):
        piece = None if ids is None else ids[:, start:end]
        if ids is not None and start:  # a state belongs to its segment: where another begins, nobody may see it
            continues = (ids[:, start] == ids[:, start - 1])[:, None, None, None]
            state = torch.where(continues, state, 0.0)
        out, state = fir(x[:, :, start:end], weights, state, piece, None, current)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


def test_equal_ids_in_two_places_are_two_segments():
    for lengths in ([5, 7, 9], [1, 2, 1, 30]):
        x, weights, initial, *_ = inputs(sum(lengths), 4, True, False)
        again = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)]).expand(2, -1)
        out, _ = fir(x, weights, initial, again)
        start = 0
        for n in lengths:
            alone, _ = fir_naive(x[:, :, start : start + n], weights, initial if start == 0 else None)
            torch.testing.assert_close(out[:, :, start : start + n], alone, rtol=0, atol=1e-12)
            start += n


def test_a_segment_is_blind_to_the_one_before_it_bit_for_bit():
    x, weights, initial, *_ = (None if a is None else a.detach() for a in inputs(90, 5, True, False, torch.float32))
    ids = (torch.arange(90) >= 41).long().expand(2, -1)
    changed, broken = x.clone(), x.clone()
    changed[:, :, :41] *= 1000
    broken[:, :, :41] = float("nan")
    expected = [part[:, :, 41:] for part in fir(x, weights, initial, ids)[:1]] + [fir(x, weights, initial, ids)[1]]
    for other in (changed, broken):
        out, last = fir(other, weights, initial * 7, ids)
        assert torch.equal(out[:, :, 41:], expected[0]) and torch.equal(last, expected[1])


def test_a_token_sees_the_taps_before_it_and_nothing_else(form):
    x, weights, *_ = inputs(70, 5, False, False)
    out, _ = fir(x, weights)
    for t in (0, 1, 4, 5, 69):
        (gradient,) = torch.autograd.grad(out[:, :, t].sum(), x, retain_graph=True)
        seen = (gradient != 0).any(3).any(1).any(0).nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - 5), t))


@pytest.mark.parametrize("segments", [False, True])
def test_strides_do_not_matter(form, segments):
    arguments = inputs(65, 4, True, segments)
    strided = [
        a if a is None or a.dim() < 3 else a.detach().transpose(1, 2).contiguous().transpose(1, 2) for a in arguments
    ]
    every_other = [a if a is None or a.dim() < 3 else torch.stack([a, a], -1).detach()[..., 0] for a in arguments]
    expected = fir(*arguments)
    for others in (strided, every_other):
        others = [a if a is None or not a.is_floating_point() else a.requires_grad_() for a in others]
        assert torch.equal(fir(*others)[0], expected[0]) and torch.equal(fir(*others)[1], expected[1])
        for a, b in zip(*(outputs_and_gradients(fir, some) for some in (others, arguments)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck(form):
    x, weights, initial, ids, addend, current = inputs(5, 3, True, True, shape=(1, 2, 2), shared=2)
    for segments in (None, ids):
        assert torch.autograd.gradcheck(
            lambda x, w, s, a, c, segments=segments: fir(x, w, s, segments, a, c),
            (x, weights, initial, addend, current),
        )


def test_an_input_alone_can_be_differentiated(form):
    arguments = inputs(12, 5, True, False)
    out, final = fir(*arguments)
    leaves = [a for a in arguments if a is not None]
    together = torch.autograd.grad(out.sum() + final.sum(), leaves)
    for index, expected in zip([i for i, a in enumerate(arguments) if a is not None], together, strict=True):
        only = [a if a is None else a.detach().requires_grad_(i == index) for i, a in enumerate(arguments)]
        out, final = fir(*only)
        torch.testing.assert_close(torch.autograd.grad(out.sum() + final.sum(), only[index])[0], expected)


def test_autocast_leaves_the_sums_in_fp32():
    arguments = inputs(300, 16, True, False, torch.float32, (2, 2, 64))
    plain = outputs_and_gradients(fir, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_and_gradients(fir, arguments)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("taps", [3, 40])
def test_only_inputs_are_saved_for_the_backward_pass(form, taps):
    x, weights, *_ = inputs(640, taps, False, False, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fir(x, weights)
    assert sum(saved) == x.numel() + weights.numel()


@pytest.mark.parametrize("state,segments", [(False, False), (True, True)])
def test_no_tensor_grows_with_taps_times_length(form, state, segments, largest_tensor):
    arguments = inputs(512, 16, state, segments, torch.float32)
    with largest_tensor() as largest:
        outputs_and_gradients(fir, arguments)
    assert largest.size < 2 * arguments[0].numel()


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda x, w, s, i, a, c: (x[0], w, s, i, a, c), "x must be"),
        (lambda x, w, s, i, a, c: (x[:, :, :0], w, s, i, a, c), "x must be"),
        (lambda x, w, s, i, a, c: (x, w[0], s, i, a, c), "weights must be"),
        (lambda x, w, s, i, a, c: (x, w[:0], s, i, a, c), "weights must be"),
        (lambda x, w, s, i, a, c: (x, w[:, :1], s, i, a, c), "weights must have shape"),
        (lambda x, w, s, i, a, c: (x, w, s[:, :, 1:], i, a, c), "initial_state"),
        (lambda x, w, s, i, a, c: (x, w, s, i[:, 1:], a, c), "segment_ids"),
        (lambda x, w, s, i, a, c: (x, w, s, i, a[:1], c), "addend"),
        (lambda x, w, s, i, a, c: (x, w, s, i, a, c[:1]), "current"),
    ],
)
def test_wrong_arguments_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        fir(*change(*inputs(6, 3, True, True)))

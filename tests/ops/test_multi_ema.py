"""The eight-decay variant against its recurrence, and against the FFT form in which its authors posted it."""

import pytest
import torch

from momentum_lm.ops import multi_ema, multi_ema_naive, multi_ema_step


def inputs(length, state, segments, batch=2, channels=5, order=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    values = torch.randn(batch, length, channels, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    decay = torch.rand(channels, order, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    log_decay = decay.log().requires_grad_()
    weight = torch.randn(channels, order, generator=generator, dtype=torch.float64).requires_grad_()
    initial = torch.randn(batch, channels, order, generator=generator, dtype=torch.float64) if state else None
    if initial is not None:
        initial.requires_grad_()
    ids = (torch.rand(batch, length, generator=generator) < 0.1).cumsum(1) if segments else None
    return values, log_decay, weight, initial, ids


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 32, 33, 200])
@pytest.mark.parametrize("state,segments", [(False, False), (True, False), (False, True), (True, True)])
def test_chunked_is_the_recurrence(length, state, segments):
    arguments = inputs(length, state, segments)
    leaves = [a for a in arguments[:4] if a is not None]
    results = []
    for function in (multi_ema, multi_ema_naive):
        out, final = function(*arguments)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, final, *torch.autograd.grad((out * weights).sum() + final.square().sum(), leaves)])
    for ours, oracle in zip(*results, strict=True):
        scale = oracle.abs().max().clamp(min=1)
        torch.testing.assert_close(ours / scale, oracle / scale, rtol=0, atol=1e-12)


def test_equals_the_posted_convolution():
    values, log_decay, weight, _, _ = inputs(50, False, False)
    kernel = torch.einsum("cn,cnt->ct", weight, torch.exp(torch.arange(50) * log_decay[..., None]))
    spectrum = torch.fft.rfft(values.transpose(1, 2), n=100) * torch.fft.rfft(kernel, n=100)
    posted = torch.fft.irfft(spectrum, n=100)[..., :50].transpose(1, 2)
    torch.testing.assert_close(multi_ema(values, log_decay, weight)[0], posted, rtol=0, atol=1e-12)


def test_steps_equal_the_whole():
    values, log_decay, weight, state, _ = inputs(40, True, False)
    whole, final = multi_ema(values, log_decay, weight, state)
    for t in range(40):
        out, state = multi_ema_step(values[:, t], log_decay, weight, state)
        torch.testing.assert_close(out, whole[:, t], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_low_precision(dtype, tolerance):
    values, log_decay, weight, _, _ = inputs(100, False, False, dtype=dtype)
    out, final = multi_ema(values, log_decay.float(), weight.float())
    exact, _ = multi_ema_naive(values.double(), log_decay, weight)
    assert out.dtype == dtype and final.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_segment_is_blind_to_the_one_before_it_bit_for_bit():
    values, log_decay, weight, _, _ = inputs(45, False, False, batch=1)
    ids = (torch.arange(45) >= 21).long()[None]
    changed = values.detach().clone()
    changed[:, :21] *= 1000
    one, other = (multi_ema(v, log_decay, weight, None, ids)[0][:, 21:] for v in (values, changed))
    assert torch.equal(one, other)


def test_equal_ids_in_two_places_are_two_segments():
    values, log_decay, weight, state, _ = inputs(45, True, False)
    ids = torch.cat([torch.full((n,), i % 2) for i, n in enumerate([3, 2, 20, 20])]).expand(2, -1)
    results = [f(values, log_decay, weight, state, ids) for f in (multi_ema, multi_ema_naive)]
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("state,segments", [(False, False), (True, True)])
def test_no_tensor_grows_faster_than_the_sequence(state, segments, largest_tensor):
    """Outputs and all gradients; a T x T matrix would be 256 times as large at the second length."""
    sizes = []
    for length in (256, 4096):
        values, log_decay, weight, initial, ids = inputs(length, state, segments, batch=1, channels=2, order=4)
        with largest_tensor() as largest:
            out, final = multi_ema(values, log_decay, weight, initial, ids)
            (out.square().sum() + final.square().sum()).backward()
        assert weight.grad is not None
        sizes.append(largest.size)
    assert sizes[1] <= 16 * sizes[0] < 4096 * 4096


@pytest.mark.parametrize("state,segments", [(False, False), (True, True)])
def test_autocast_changes_neither_outputs_nor_gradients(state, segments):
    """As in training: the forward pass alone runs under autocast."""
    arguments = inputs(100, state, segments)
    values, log_decay, weight, initial = (
        None if a is None else a.detach().float().requires_grad_() for a in arguments[:4]
    )
    leaves = [a for a in (values, log_decay, weight, initial) if a is not None]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, final = multi_ema(values, log_decay, weight, initial, arguments[4])
        results.append([out, final, *torch.autograd.grad(out.square().sum() + final.square().sum(), leaves)])
    for plain, cast in zip(*results, strict=True):
        assert cast.dtype == torch.float32 and torch.equal(plain, cast)

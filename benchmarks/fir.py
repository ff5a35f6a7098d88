"""A causal filter of K taps on a CPU: ours beside shifted sums, convolutions and unfolding in plain torch.

    python benchmarks/fir.py [--lengths 1,16,256,1024] [--taps 1,3,4,16,40] [--channels 192,768] [--json OUT.json]

Milliseconds of a forward pass, and of a forward and a backward pass (gradients of the inputs and of the weights): the
median of rounds in which every form has its turn. Inputs and outputs lie in memory as attention has them, heads side by
side.
"""

import argparse
import functools
import json
import statistics

import torch
import torch.nn.functional as F
from clock import seconds_each

from momentum_lm.ops import fir

HEAD = 64
SECONDS = 1.0  # for all rounds of one form, about


def before(x, taps):
    """x (B, T, C) -> (B, T + K - 1, C): what the outputs' tokens see."""
    return F.pad(x[:, :-1], (0, 0, taps, 0))


def shifted(x, weights):
    padded, length = before(x, len(weights)), x.shape[1]
    return sum(padded[:, len(weights) - k :][:, :length] * weight for k, weight in enumerate(weights, 1))


def convolution(x, weights):
    kernel = weights.flip(0).T[:, None]
    return F.conv1d(before(x, len(weights)).transpose(1, 2), kernel, groups=len(kernel)).transpose(1, 2).contiguous()


def channels_last(x, weights):
    image = before(x, len(weights)).transpose(1, 2)[..., None]
    kernel = weights.flip(0).T[:, None, :, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(image, kernel, groups=len(kernel))[..., 0].transpose(1, 2)


def unfolded(x, weights):
    return (before(x, len(weights)).unfold(1, len(weights), 1) * weights.flip(0).T).sum(-1)


def ours(x, weights):
    heads = (x.shape[2] // HEAD, HEAD) if x.shape[2] % HEAD == 0 else (1, x.shape[2])
    values = x.unflatten(2, heads).transpose(1, 2)
    return fir(values, weights.unflatten(1, heads))[0].transpose(1, 2).flatten(2)


FORMS = {"ours": ours, "shifted": shifted, "conv1d": convolution, "channels last": channels_last, "unfold": unfolded}


def both_ways(form, x, weights, grad):
    return torch.autograd.grad(form(x, weights), (x, weights), grad)


def measure(batch, length, taps, channels, rounds):
    """{form: (milliseconds forward, milliseconds both ways)}."""
    x, grad = torch.randn(batch, length, channels), torch.randn(batch, length, channels)
    weights = torch.randn(taps, channels)
    leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
    calls = [functools.partial(form, x, weights) for form in FORMS.values()]
    calls += [functools.partial(both_ways, form, *leaves, grad) for form in FORMS.values()]
    first = seconds_each(calls, "cpu")
    rounds = max(3, min(rounds, int(SECONDS / max(first))))
    medians = [1000 * statistics.median(times) for times in zip(*(seconds_each(calls, "cpu") for _ in range(rounds)),
                                                                strict=True)]  # fmt: skip
    return dict(zip(FORMS, zip(medians[: len(FORMS)], medians[len(FORMS) :], strict=True), strict=True))


def numbers(text):
    return [int(word) for word in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=[1, 16, 256, 1024])
    parser.add_argument("--taps", type=numbers, default=[1, 3, 4, 16, 40])
    parser.add_argument("--channels", type=numbers, default=[192, 768])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=50, help="at most so many for a shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, batch {args.batch}; ms forward / forward and backward")
    print(f"{'channels':>8} {'length':>6} {'taps':>4}" + "".join(f"{name:>20}" for name in FORMS))
    results = []
    for channels in args.channels:
        for length in args.lengths:
            for taps in args.taps:
                row = measure(args.batch, length, taps, channels, args.rounds)
                results.append({"channels": channels, "length": length, "taps": taps, "ms": row})
                cells = "".join(f"{f'{ahead:.3f} / {both:.3f}':>20}" for ahead, both in row.values())
                print(f"{channels:8} {length:6} {taps:4}{cells}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": args.threads, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()

"""The fused EMA kernels on a GPU, beside copying as many bytes and beside the EMA in plain torch.

    python benchmarks/ema_kernel.py [--json OUT.json] [--tune]

Calls are captured in a CUDA graph, so that Python's time to launch them does not count, over inputs and outputs that
together are several times a GPU's cache. A copy is ``torch.clone`` of half the bytes that the kernel has to read and
write. ``--tune`` also tries other launch parameters for the first shape.
"""

import argparse
import functools
import itertools
import json
import statistics
import sys

import torch

SHAPES = [  # batch, heads, length, dimension, dtype
    (8, 16, 2048, 64, torch.bfloat16),
    (8, 16, 2048, 64, torch.float16),
    (8, 16, 2048, 64, torch.float32),
    (4, 32, 2048, 128, torch.bfloat16),
    (8, 32, 2048, 80, torch.bfloat16),
    (32, 12, 1024, 64, torch.bfloat16),
    (1, 16, 16384, 64, torch.bfloat16),
]
SMALL = (1, 2, 40, 16, torch.float32)  # to try the benchmark without a GPU, in Triton's interpreter
SETS = 12  # of inputs and outputs that the calls go through, against the cache
GOAL = 0.7


def milliseconds(calls, repeats=20):
    """Median time of one call, of all in one graph; without a GPU, of one after the other."""
    if not torch.cuda.is_available():
        from clock import seconds_each

        return 1000 * statistics.median(seconds_each(calls, "cpu"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # each its own output: one buffer for all would stay in the cache
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    del kept
    return statistics.median(times)


def make_sets(shape, device, count=SETS):
    """(values, addend, gradient of the output) as attention has them, heads side by side in memory, and the heads'
    decays.
    """
    batch, heads, length, dim, dtype = shape
    tensors = [
        tuple(torch.randn(batch, length, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
        for _ in range(count)
    ]
    return tensors, torch.linspace(0.9, 0.999, heads, device=device).log()


def kernel_calls(sets, log_decay, ids):
    """name -> (calls, bytes that one has to move)."""
    from momentum_lm.ops import triton as kernels

    size = sets[0][0].nbytes
    states = [kernels._forward(v, log_decay, None, ids, a, True)[2] for v, a, _ in sets]
    extra = states[0].nbytes
    return {
        "forward": (
            [functools.partial(kernels._forward, v, log_decay, None, ids, a, False) for v, a, _ in sets],
            3 * size,
        ),
        "forward, learned": (
            [functools.partial(kernels._forward, v, log_decay, None, ids, a, True) for v, a, _ in sets],
            3 * size + extra,
        ),
        "backward": (
            [functools.partial(kernels._backward, g, log_decay, None, ids, None, None) for _, _, g in sets],
            2 * size,
        ),
        "backward, learned": (
            [
                functools.partial(kernels._backward, g, log_decay, None, ids, v, s)
                for (v, _, g), s in zip(sets, states, strict=True)
            ],
            3 * size + extra,
        ),
    }


def both_ways(function, values, addend, grad, log_decay):
    """Forward and backward, through automatic differentiation."""
    inputs = [values.detach().requires_grad_(), addend.detach().requires_grad_()]
    out, _ = function(inputs[0], log_decay, None, None, inputs[1])
    return torch.autograd.grad(out, inputs, grad)


def label(shape):
    *sizes, dtype = shape
    return "B{} H{} T{} D{} ".format(*sizes) + str(dtype).removeprefix("torch.")


def measure(shape, device, count=SETS):
    """Yields (name, numbers), each as soon as it is known."""
    from momentum_lm.ops import ema
    from momentum_lm.ops.chunked import ema_chunked

    sets, log_decay = make_sets(shape, device, count)
    batch, _, length, _, dtype = shape
    packed = (torch.arange(length, device=device) // 700).expand(batch, -1)
    for suffix, ids in (("", None), (", packed", packed)):
        for name, (calls, moved) in kernel_calls(sets, log_decay, ids).items():
            copied = torch.empty(count, moved // 2 // dtype.itemsize, device=device, dtype=dtype)
            kernel, copy = milliseconds(calls), milliseconds([row.clone for row in copied])
            yield name + suffix, {"ms": kernel, "gb_per_s": moved / kernel / 1e6, "of_copy": copy / kernel}
    fused, plain = (
        milliseconds([functools.partial(both_ways, f, *s, log_decay) for s in sets[:4]]) for f in (ema, ema_chunked)
    )
    yield "both ways", {"ms": fused, "plain_ms": plain, "speedup": plain / fused}


def candidates():
    """Launch parameters to try, those that differ least from the chosen ones first; None: the chosen ones."""
    from momentum_lm.ops import triton as kernels

    chosen = kernels.launch(SHAPES[0][-1])
    tried = [kernels.Launch(*parameters) for parameters in itertools.product((32, 64), (16, 32, 64), (4, 8), (2, 3, 4))]
    return [None, *sorted(tried, key=lambda one: sum(a != b for a, b in zip(one, chosen, strict=True)))]


def tune(device, shape=SHAPES[0], count=SETS, tried=None):
    """Yields (forward and backward milliseconds together, parameters or "chosen", each) of the shape under other launch
    parameters.
    """
    from momentum_lm.ops import triton as kernels

    sets, log_decay = make_sets(shape, device, count)
    chosen = kernels.launch
    for candidate in candidates() if tried is None else tried:
        if candidate is not None:
            kernels.launch = lambda dtype, both=False, candidate=candidate: candidate
        try:
            times = {name: milliseconds(calls) for name, (calls, _) in kernel_calls(sets, log_decay, None).items()}
        except Exception as error:  # Triton's, where a GPU has not enough shared memory or registers
            print(f"{candidate}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            continue
        finally:
            kernels.launch = chosen
        yield sum(times.values()), "chosen" if candidate is None else candidate._asdict(), times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--tune", action="store_true", help="also try other launch parameters for the first shape")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark times GPU kernels and needs a CUDA GPU; torch sees none", file=sys.stderr)
        raise SystemExit(2)

    device = torch.device("cuda")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    results = {}
    for shape in SHAPES:
        results[label(shape)] = rows = {}
        print(label(shape))
        for name, row in measure(shape, device):
            rows[name] = row
            print(f"  {name:26}" + "  ".join(f"{key} {value:9.4f}" for key, value in row.items()))
        torch.cuda.empty_cache()
    first = next(iter(results.values()))
    for name in ("forward", "backward"):
        ratio = first[name]["of_copy"]
        print(
            f"{name} of the first shape: {ratio:.2f} of the speed of copying, {'as' if ratio >= GOAL else 'NOT as'} "
            f"wanted ({GOAL})"
        )
    if args.tune:
        results["launch parameters"] = found = sorted(tune(device), key=lambda row: row[0])
        for total, parameters, times in found[:10]:
            print(f"{total:.4f} ms  {parameters}  " + "  ".join(f"{name} {time:.4f}" for name, time in times.items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "results": results},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()

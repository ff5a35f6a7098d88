"""The fused EMA kernels on a GPU, beside copying as many bytes and beside the EMA in plain torch.

    python benchmarks/ema_kernel.py [--json OUT.json] [--tune]

Calls are captured in a CUDA graph, so that Python's time to launch them does not count, over inputs and outputs that together are
several times a GPU's cache. A copy is ``torch.clone`` of half the bytes that the kernel has to read and write. ``--tune`` also
tries other launch parameters for the first shape.
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
SETS = 12  # of inputs and outputs that the calls go through, against the cache
GOAL = 0.7


def milliseconds(calls, repeats=20):
    """Median time of one call, of all in one graph."""
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
    """(values, addend, gradient of the output) as attention has them, heads side by side in memory, and the heads' decays."""
    batch, heads, length, dim, dtype = shape
    tensors = [
        tuple(torch.randn(batch, length, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)) for _ in range(count)
    ]
    return tensors, torch.linspace(0.9, 0.999, heads, device=device).log()


def kernel_calls(sets, log_decay, ids):
    """name -> (calls, bytes that one has to move)."""
    from momentum_lm.ops import triton as kernels

    size = sets[0][0].nbytes
    states = [kernels._forward(v, log_decay, None, ids, a, True)[2] for v, a, _ in sets]
    extra = states[0].nbytes
    return {
        "forward": ([functools.partial(kernels._forward, v, log_decay, None, ids, a, False) for v, a, _ in sets], 3 * size),
        "forward, learned": ([functools.partial(kernels._forward, v, log_decay, None, ids, a, True) for v, a, _ in sets], 3 * size + extra),
        "backward": ([functools.partial(kernels._backward, g, log_decay, None, ids, None, None) for _, _, g in sets], 2 * size),
        "backward, learned": (
            [functools.partial(kernels._backward, g, log_decay, None, ids, v, s) for (v, _, g), s in zip(sets, states, strict=True)],
            3 * size + extra,
        ),
    }


def both_ways(function, values, addend, grad, log_decay):
    """Forward and backward, through automatic differentiation."""
    inputs = [values.detach().requires_grad_(), addend.detach().requires_grad_()]
    out, _ = function(inputs[0], log_decay, None, None, inputs[1])
    return torch.autograd.grad(out, inputs, grad)


def measure(shape, device):
    from momentum_lm.ops import ema
    from momentum_lm.ops.chunked import ema_chunked

    sets, log_decay = make_sets(shape, device)
    batch, _, length, _, dtype = shape
    packed = (torch.arange(length, device=device) // 700).expand(batch, -1)
    rows = {}
    for suffix, ids in (("", None), (", packed", packed)):
        for name, (calls, moved) in kernel_calls(sets, log_decay, ids).items():
            copied = torch.empty(SETS, moved // 2 // dtype.itemsize, device=device, dtype=dtype)
            kernel, copy = milliseconds(calls), milliseconds([row.clone for row in copied])
            rows[name + suffix] = {"ms": kernel, "gb_per_s": moved / kernel / 1e6, "of_copy": copy / kernel}
    fused, plain = (milliseconds([functools.partial(both_ways, f, *s, log_decay) for s in sets[:4]]) for f in (ema, ema_chunked))
    rows["both ways"] = {"ms": fused, "plain_ms": plain, "speedup": plain / fused}
    return rows


def tune(device):
    """Forward and backward times of the first shape under other launch parameters, the fastest first."""
    from momentum_lm.ops import triton as kernels

    sets, log_decay = make_sets(SHAPES[0], device)
    chosen, found = kernels.launch, []
    for parameters in itertools.product((32, 64), (16, 32, 64), (4, 8), (2, 3, 4)):
        candidate = kernels.Launch(*parameters)
        kernels.launch = lambda dtype, both=False, candidate=candidate: candidate
        times = {name: milliseconds(calls) for name, (calls, _) in kernel_calls(sets, log_decay, None).items()}
        found.append((sum(times.values()), candidate._asdict(), times))
    kernels.launch = chosen
    return sorted(found, key=lambda row: row[0])


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
        *sizes, dtype = shape
        label = "B{} H{} T{} D{} ".format(*sizes) + str(dtype).removeprefix("torch.")
        results[label] = rows = measure(shape, device)
        print(label)
        for name, row in rows.items():
            print(f"  {name:26}" + "  ".join(f"{key} {value:9.4f}" for key, value in row.items()))
        torch.cuda.empty_cache()
    first = next(iter(results.values()))
    for name in ("forward", "backward"):
        ratio = first[name]["of_copy"]
        print(f"{name} of the first shape: {ratio:.2f} of the speed of copying, {'as' if ratio >= GOAL else 'NOT as'} wanted ({GOAL})")
    if args.tune:
        results["launch parameters"] = found = tune(device)
        for total, parameters, times in found[:10]:
            print(f"{total:.4f} ms  {parameters}  " + "  ".join(f"{name} {time:.4f}" for name, time in times.items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()

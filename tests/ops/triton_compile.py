"""Compiles the kernels ahead of time, which needs no GPU, and prints what came out as JSON: triton_compile.py ARCH,
such as 90.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from momentum_lm.ops import triton as kernels
from momentum_lm.ops import triton_fir as fir

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
OF_VALUES = ("values", "addend", "out", "grad", "grad_values")
# What a call leaves out, by what it is: pretraining, and everything at once.
ABSENT = {
    "plain": {"initial_state", "states", "segment_ids", "grad_final", "values", "grad_decay"},
    "learned": {"initial_state", "segment_ids", "grad_final"},
    "packed": {"initial_state", "states", "grad_final", "values", "grad_decay"},
    "all": set(),
}
REGISTERS = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def compile_kernel(kernel, arch, dtype, dim, kind):
    """As a call with contiguous, aligned tensors compiles it."""
    both = kernel is kernels._backward_kernel and "values" not in ABSENT[kind]
    absent = ABSENT[kind] - ({"values"} if kernel is kernels._forward_kernel else set())
    chunk, block, warps, stages = kernels.launch(dtype, both)
    constants = {"DIM": dim, "CHUNK": chunk, "BLOCK": block, "STAGES": stages}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in absent:
            constants[name] = None
        elif re.search("_d$", name) or (name == "shared" and kind != "all"):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name != "shared":
            attributes[index,] = [["tt.divisibility", 16]]
        if name == "segment_ids":
            signature[name] = "*i64"
        elif name in ("heads", "shared", "length") or re.search("_[bht]$", name):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS[dtype] if name in OF_VALUES else "*fp32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def compile_fir(kernel, arch, dtype, dim, kind):
    """As training calls it with contiguous, aligned tensors: plain, or packed with everything that there is."""
    absent = {"runs", "addend", "current"}.intersection(kernel.arg_names if kind == "plain" else ())
    constants = {"TAPS": 3, "DIM": dim, "TOKENS": fir.TOKENS, "CHANNELS": fir.CHANNELS} | dict.fromkeys(absent)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if re.search("_d$", name) or name == "shared":
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        attributes[index,] = [["tt.divisibility", 16]]
        if name == "runs":
            signature[name] = "*i64"
        elif name in ("heads", "length") or re.search("_[bht]$", name):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32" if name in ("weights", "current", "summands") else POINTERS[dtype]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})


def describe(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = map(int, REGISTERS.search(report).groups())
    return {
        "cubin": len(compiled.asm["cubin"]),
        "registers": registers,
        "spilled": stack + local,
        "shared": compiled.metadata.shared,
        "copies_ahead": "cp.async" in compiled.asm["ptx"],
        "tensor_cores": "wgmma"
        if "wgmma" in compiled.asm["ptx"]
        else "mma"
        if "mma.sync" in compiled.asm["ptx"]
        else None,
    }


def main():
    arch = int(sys.argv[1])
    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        for dtype in POINTERS:
            for dim, kind in [(64, "plain"), (128, "learned"), (64, "packed"), (128, "all"), (80, "all")]:
                name = {"kernel": kernel.__name__, "dtype": str(dtype), "dim": dim, "kind": kind}
                print(json.dumps({**name, **describe(compile_kernel(kernel, arch, dtype, dim, kind))}), flush=True)
    for kernel in (fir._forward_kernel, fir._backward_kernel):
        for dtype in POINTERS:
            for dim, kind in [(64, "plain"), (80, "all")]:
                name = {"kernel": f"fir{kernel.__name__}", "dtype": str(dtype), "dim": dim, "kind": kind}
                print(json.dumps({**name, **describe(compile_fir(kernel, arch, dtype, dim, kind))}), flush=True)


if __name__ == "__main__":
    main()

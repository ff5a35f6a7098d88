"""GPUs, by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``name``: a part of the name that CUDA reports. Rates are peaks per second, without sparsity."""

    name: str
    flops: float  # bf16 tensor cores (fp16 where there is no bf16)
    fp32_flops: float  # outside the tensor cores, as torch multiplies fp32 matrices
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes/s
    link: float  # to the other GPUs of its node, bytes/s in one direction: NVLink, or PCIe where there is none
    bf16: bool = True


GPUS = {
    "a100-40gb": Gpu("A100", 312e12, 19.5e12, 40e9, 1.555e12, 300e9),
    "a100-80gb": Gpu("A100", 312e12, 19.5e12, 80e9, 2.039e12, 300e9),
    "h100-pcie": Gpu("H100 PCIe", 756e12, 51e12, 80e9, 2.0e12, 64e9),  # before H100, whose name is a part of its own
    "h100": Gpu("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9),
    "h200": Gpu("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9),
    "b200": Gpu("B200", 2250e12, 75e12, 180e9, 7.7e12, 900e9),
    "l40s": Gpu("L40S", 362e12, 91.6e12, 48e9, 0.864e12, 32e9),
    "v100": Gpu("V100", 125e12, 15.7e12, 32e9, 0.9e12, 150e9, bf16=False),
}


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak (fp16 on V100) of the GPU that CUDA calls so, or None."""
    return next((gpu.flops for gpu in GPUS.values() if gpu.name in device_name), None)

"""What there is to compute with where there is no GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from pathlib import Path


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bf16_instructions() -> list[str]:
    """Names of the CPU's bf16 instructions, with which ``--autocast bf16`` is about twice as fast; none where Linux does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(r"\b(?:amx_bf16|avx512_bf16|bf16)\b", text)))


def return_memory() -> None:
    """Gives the system back what is no longer used: the C library of Linux keeps it, in pieces into which other tensors do not fit."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if trim is not None:
        trim(0)

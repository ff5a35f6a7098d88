"""What there is to compute with where there is no GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bf16_instructions() -> list[str]:
    """Names of the CPU's bf16 instructions, with which ``--autocast bf16`` is about twice as fast; none where Linux
    does not tell.
    """
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(r"\b(?:amx_bf16|avx512_bf16|bf16)\b", text)))


def map_large_tensors() -> None:
    """For a program's main: from now on memory for tensors of 2 MiB and more goes back to the system when they are
    freed.

    The C library of Linux raises that limit to 32 MiB as a program goes on, and keeps what is below, for each thread by
    itself: weights that come and go then leave holes into which others do not fit. All threads share one heap from now
    on.
    """
    _set_malloc({_M_MMAP_THRESHOLD: 2 << 20, _M_ARENA_MAX: 1})


def keep_memory() -> None:
    """For a program that computes the same again and again: from now on memory of freed tensors below 32 MiB waits for
    the next ones.

    Otherwise the C library of Linux gives most of it back, and the system clears every page anew.
    """
    _set_malloc({_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: -1})


def _set_malloc(options: dict[int, int]) -> None:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if set_option is not None:
        for name, value in options.items():
            set_option(name, value)


def return_memory(collect: bool = True) -> None:
    """Gives the system back what is no longer used of the memory that the C library of Linux keeps.

    ``collect``: also of objects that refer to each other, which takes a quarter of a second beside a large library;
    without, some ms.
    """
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

import os
import subprocess
import sys

import pytest

from momentum_lm.cpu import bf16_instructions, return_memory, usable_cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cpus_are_those_that_the_process_may_use():
    assert 1 <= usable_cpus() <= os.cpu_count()
    code = (
        "import os; from momentum_lm.cpu import usable_cpus\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(usable_cpus())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_bf16_instructions_are_those_of_the_kernels_list():
    try:
        with open("/proc/cpuinfo") as file:
            words = set(file.read().split())
    except OSError:
        words = set()
    assert bf16_instructions() == sorted(words & {"amx_bf16", "avx512_bf16", "bf16"})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_what_was_freed_goes_back_to_the_system():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    kept = []
    blocks = [bytearray(100_000) for _ in range(2000)]  # 200 MB in pieces too small to be mapped one by one
    kept.append(bytearray(100_000))  # what lies behind them keeps the heap from shrinking by itself
    del blocks
    before = resident()
    return_memory()
    assert resident() < before - 100_000_000

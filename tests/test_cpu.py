import os
import subprocess
import sys

import pytest

from momentum_lm.cpu import bf16_instructions, return_memory, usable_cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cpus_are_those_that_the_process_may_use():
    assert 1 <= usable_cpus() <= os.cpu_count()
    code = "import os; from momentum_lm.cpu import usable_cpus\n"
    code += "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_bf16_instructions_are_among_those_that_there_are():
    assert set(bf16_instructions()) <= {"amx_bf16", "avx512_bf16", "bf16"}


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(size):
    """200 MB in pieces, and one that lies behind them, which keeps the heap from shrinking by itself."""
    return [b"x" * size for _ in range(200_000_000 // size)], b"x" * size


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_what_was_freed_goes_back_to_the_system():
    pieces, _last = fill(100_000)
    del pieces
    before = resident()
    return_memory()
    assert resident() < before - 100_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    ("function", "before", "pieces", "freed"),
    [  # 200 MB in pieces. After the first the C library keeps, behind another one, what is as large
        ("map_large_tensors", "piece = b'x' * 30_000_000; del piece", "pieces, last = fill(4_000_000)", True),
        ("keep_memory", "", "pieces = [b'x' * 20_000_000 for _ in range(10)]", False),
    ],
)
def test_large_tensors_go_back_or_stay_as_asked(function, before, pieces, freed):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        f"from momentum_lm.cpu import {function}\n"
        "from test_cpu import fill, resident\n"
        "{}\n"
        f"{before}\n"
        f"{pieces}; full = resident(); del pieces; print(full - resident() > 150_000_000)"
    )
    for call, expected in ((f"{function}()", freed), ("", not freed)):
        command = [sys.executable, "-c", code.format(call), os.path.dirname(__file__)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{expected}\n", call

"""What strangers' and damaged files do to what reads them: tests/mutations.py makes them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutations.py")
spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
mutations = importlib.util.module_from_spec(spec)
sys.modules["mutations"] = mutations
spec.loader.exec_module(mutations)

KNOWN = {
    "checkpoint, by fairseq": [44, 213, 214, 246, 300, 344, 487, 508],
    "checkpoint in parts": [294, 828],
}  # numbers of mutations that once went wrong
NIGHTLY_ONLY = {
    "results of lm_perplexity",
    "results of icl_classification",
    "results of icl_finetune_analysis",
}  # a report takes a second


@pytest.mark.parametrize("name", [name for name in mutations.READERS if name not in NIGHTLY_ONLY])
def test_forty_mutations_are_read_or_refused_in_one_line(name, tmp_path, capfd):
    reader = mutations.READERS[name]
    (tmp_path / "good").mkdir()
    reader.make(tmp_path / "good")
    assert mutations.outcome(reader, tmp_path / "good") == mutations.READ
    for number in [*range(40), *KNOWN.get(name, [])]:
        mutations.mutated(reader, number, tmp_path / "good", tmp_path / "work")
        found = mutations.outcome(reader, tmp_path / "work")
        assert found in (mutations.READ, mutations.REFUSED), f"python tests/mutations.py {name!r} {number} 1"


@pytest.mark.nightly
@pytest.mark.parametrize("name", mutations.READERS)
def test_a_thousand_mutations_are_read_or_refused_in_one_line(name):
    result = subprocess.run([sys.executable, SCRIPT, name, "0", "1000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def crash(folder):
    import ctypes

    ctypes.string_at(0)


def hang(folder):
    while True:
        pass


def fill(folder):
    return len(bytearray(3 << 30))


def fail(folder):
    raise KeyError("x")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_what_goes_wrong_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "SECONDS", 0.2)
    monkeypatch.setattr(mutations.signal, "alarm", lambda seconds: 0)
    wrong = {"SIGSEGV": crash, "SIGPROF": hang, "MemoryError": fill, "KeyError": fail}
    for expected, read in wrong.items():

        def sometimes(folder, read=read):
            if "good" not in folder.parts and (folder / "file").read_bytes()[:1] != b"a":
                read(folder)

        reader = mutations.Reader(expected, lambda folder: (folder / "file").write_bytes(b"a" * 10), sometimes)
        monkeypatch.setitem(mutations.READERS, expected, reader)
        failures = mutations.run(expected, tmp_path / expected, 0, 8)
        assert 0 < len(failures) < 8 and all(expected in text for text in failures.values()), failures


@pytest.mark.parametrize("name", ["checkpoint", "data set: csv"])
def test_a_mutation_is_always_the_same(name, tmp_path):
    reader = mutations.READERS[name]
    (tmp_path / "good").mkdir()
    reader.make(tmp_path / "good")
    for folder in ("one", "other"):
        mutations.mutated(reader, 5, tmp_path / "good", tmp_path / folder)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("good", "one", "other")
    ]
    assert files[1] == files[2] != files[0]

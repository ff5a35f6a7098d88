"""The house rules that a machine can check: who imports whom, and that the core stands without fairseq and transformers."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "momentum_lm"
ADAPTERS = {"fairseq_plugin", "models", "tasks", "criterions", "optim", "training", "cli", "convert", "harness"}
CORE = sorted({p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} - ADAPTERS)
# What each room of the core may import of ours, besides errors and files.
MAY_IMPORT = {
    "ops": set(),
    "analysis": set(),
    "modules": {"ops"},
    "planning": {"modules", "ops"},
    "data": set(),
    "formats": set(),
    "results": {"icl", "lm", "data"},
    "report": {"analysis", "results"},
    "lm": {"modules", "ops", "data", "formats"},
    "icl": {"lm", "data", "modules"},
    "studies": {"icl", "lm", "data", "analysis", "results", "report", "modules", "ops"},
}
# As if they were not installed. (None in sys.modules is not that: `datasets` takes such an entry for an imported module.)
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def imported_rooms(path):
    """The rooms of ours that a file imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module != "momentum_lm" else [f"momentum_lm.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "momentum_lm" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("room", CORE)
def test_imports_point_one_way(room):
    for path in (PACKAGE / room).rglob("*.py"):
        extra = set(imported_rooms(path)) - MAY_IMPORT[room] - {room, "errors", "files", "cpu", "system", "__version__"}
        assert not extra, f"{path.relative_to(ROOT)} imports {', '.join(sorted(extra))}"


def test_nothing_in_the_core_imports_the_adapters():
    for room in CORE:
        for path in (PACKAGE / room).rglob("*.py"):
            assert not ADAPTERS & set(imported_rooms(path)), path


def test_the_core_imports_without_fairseq_and_transformers():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in CORE
        for path in sorted((PACKAGE / room).rglob("*.py"))
        if path.name != "triton.py" or importlib.util.find_spec("triton")
    ]
    assert len(modules) > 20
    subprocess.run([sys.executable, "-c", BLOCK + "".join(f"import {m}; " for m in modules)], check=True, cwd=ROOT)


def test_importing_the_package_imports_neither_torch_nor_fairseq():
    code = "import sys, momentum_lm; sys.exit(bool({'torch', 'fairseq', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_cores_tests_pass_without_fairseq_and_transformers():
    """Those that compare with fairseq ask for it with ``pytest.importorskip`` or live outside these folders."""
    folders = [f"tests/{room}" for room in CORE if (ROOT / "tests" / room).exists()]
    code = BLOCK + f"import pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', *{folders!r}]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout

"""The house rules that a machine can check: who imports whom, and that the core stands without fairseq and
transformers.
"""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import BLOCK

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "momentum_lm"
# A room imports those before it. The last three import anything, and nothing imports them, each other included.
ROOMS = (
    *(
        "errors",
        "files",
        "system",
        "untrusted",
        "cpu",
        "ops",
        "model",
        "text",
        "formats",
        "lm",
        "icl",
        "analysis",
        "results",
    ),
    *("studies", "report", "planning", "fairseq_plugin", "harness", "cli"),
)
FRONT = ("fairseq_plugin", "harness", "cli")
CORE = [room for room in ROOMS if room not in FRONT and (PACKAGE / room).is_dir()]


def imported(path):
    """The modules that a file imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module != "momentum_lm" else [f"momentum_lm.{alias.name}" for alias in node.names]
        yield from names


def imported_rooms(path):
    """The rooms of ours among them."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("momentum_lm.")}


def test_every_room_is_listed():
    assert {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_." and path.name != "py.typed"} == set(
        ROOMS
    )


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    above = set(ROOMS) - set(FRONT) if room in FRONT else set(ROOMS[: ROOMS.index(room)])
    files = (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    for path in files:
        extra = imported_rooms(path) - above - {room, "__version__"}
        assert not extra, f"{path.relative_to(ROOT)} imports {', '.join(sorted(extra))}"


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "fairseq_plugin"])
def test_fairseq_is_imported_in_one_room(room):
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == room:
            names = {name.partition(".")[0] for name in imported(path)}
            assert not names & {"fairseq", "fairseq_cli"}, path


@pytest.mark.parametrize("folder", ["examples", "scripts", "benchmarks"])
def test_programs_beside_the_package_import_names_that_exist(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "momentum_lm":
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    found = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                    assert found, f"{path.relative_to(ROOT)}:{node.lineno}: {node.module} has no {name}"


def test_no_function_is_longer_than_sixty_lines():
    for path in [*PACKAGE.rglob("*.py"), ROOT / "fairseq_compat.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path.relative_to(ROOT)}: {node.name}"


def test_the_core_imports_without_fairseq_and_transformers():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in CORE
        for path in sorted((PACKAGE / room).rglob("*.py"))
        if path.parent.name != "remote" and (path.name != "triton.py" or importlib.util.find_spec("triton"))
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


def test_contributing_names_files_that_there_are():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    days = text[text.index("## A day in the life") : text.index("## Words")]
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", days)
    assert len(named) > 30 and not [name for name in named if not (ROOT / "momentum_lm" / name).exists()]

"""``momentum-lm doctor``: checks the installation, and prints the remedy beside each problem."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from momentum_lm.cpu import bf16_instructions, usable_cpus
from momentum_lm.errors import main_guard

from .options import Parser

FAIRSEQ = "0.12.2"
_INSTALL_FAIRSEQ = f"READTHEDOCS=1 pip install --no-deps fairseq=={FAIRSEQ}"
_REGISTERED = {
    "arch": ["gpt_lm_tiny", "momentum_lm_tiny"],
    "task": ["momentum_language_modeling"],
    "criterion": ["chunked_cross_entropy"],
    "optimizer": ["fused_adamw", "muon"],
}
# What a fairseq-* command finds: a fresh interpreter, which reads .pth files, away from any checkout. The hook is
# imported by hand
# only after it was looked for, so that its absence does not hide everything else.
_PROBE = """
import json, sys
found = {"hook": "fairseq_compat" in sys.modules}
import fairseq_compat, fairseq
from fairseq.data import data_utils_fast
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
found["arch"], found["task"] = sorted(ARCH_MODEL_REGISTRY), sorted(TASK_REGISTRY)
found.update({name: sorted(REGISTRIES[name]["registry"]) for name in ("criterion", "optimizer")})
print(json.dumps(found))
"""


class Check(NamedTuple):
    status: str  # ok, warn or problem
    name: str
    detail: str
    remedy: str = ""


def check_python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 11):  # noqa: UP036  (a checkout on PYTHONPATH: no pip has refused it)
        yield Check("problem", "python", version, "use Python 3.11 or later")
    elif sys.version_info >= (3, 15):
        yield Check(
            "warn", "python", f"{version} is newer than what was tested", "use Python 3.11 to 3.14 if something fails"
        )
    else:
        yield Check("ok", "python", f"{version} ({sys.executable})")


def check_requirements() -> Iterator[Check]:
    """The installed versions against what setup.py asks for: `pip check` cannot tell, for fairseq's own pins always
    fail it.
    """
    try:
        lines = importlib.metadata.requires("momentum_lm") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("warn", "requirements", "momentum_lm is not installed: running from a checkout", "pip install .")
        return
    wrong: dict[str, str] = {}
    for line in lines:
        name, bounds, marker = re.fullmatch(r"([\w.-]+)([^;]*)(;.*)?", line).groups()  # type: ignore[union-attr]
        if marker:
            continue  # an extra's
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong[line] = f"{name} is missing"
            continue
        for operator, bound in re.findall(r"(>=|<)([\d.]+)", bounds):
            if (_numbers(version) < _numbers(bound)) == (operator == ">="):
                wrong[line] = f"{name} {version} is not {operator}{bound}"
    if wrong:
        remedy = "pip install " + " ".join(f"'{line}'" for line in wrong)
        yield Check("problem", "requirements", "; ".join(wrong.values()), remedy)
    else:
        yield Check("ok", "requirements", "all there, in the right versions")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]


def check_fairseq() -> Iterator[Check]:
    try:
        version = importlib.metadata.version("fairseq")
    except importlib.metadata.PackageNotFoundError:
        yield Check("problem", "fairseq", "not installed", _INSTALL_FAIRSEQ)
        return
    if version != FAIRSEQ:
        yield Check("problem", "fairseq", f"{version}, but the hook fixes {FAIRSEQ}", _INSTALL_FAIRSEQ)
    if os.environ.get("FAIRSEQ_COMPAT") == "0":
        yield Check("problem", "fairseq hook", "turned off by FAIRSEQ_COMPAT=0", "unset FAIRSEQ_COMPAT")
    with tempfile.TemporaryDirectory() as elsewhere:
        run = subprocess.run([sys.executable, "-c", _PROBE], cwd=elsewhere, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = _INSTALL_FAIRSEQ.replace("install", "install --force-reinstall")
        yield Check("problem", "fairseq", f"cannot be imported: {reason}", remedy)
        return
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    yield Check("ok", "fairseq", f"{version}, imports")
    if found["hook"]:
        yield Check("ok", "fairseq hook", "active in every Python of this environment")
    elif os.environ.get("FAIRSEQ_COMPAT") != "0":
        detail = "fairseq_compat.pth is not read at start-up (PYTHONPATH and pip --target do not read .pth files)"
        site = sysconfig.get_path("purelib")
        remedy = f"`pip install .` in the checkout, so that it is in {site}; or without installing, run "
        yield Check("problem", "fairseq hook", detail, remedy + "`python -m fairseq_compat fairseq-train ...`")
    missing = [f"{kind} {name}" for kind, names in _REGISTERED.items() for name in names if name not in found[kind]]
    if missing:
        warnings = [line for line in run.stderr.splitlines() if line.startswith("warning: fairseq plugin")]
        detail = "; ".join([f"not registered: {', '.join(missing)}", *warnings])
        remedy = "pip install . in the checkout, or add --user-dir momentum_lm to fairseq's commands"
        yield Check("problem", "plugin", detail, remedy)
    else:
        yield Check("ok", "plugin", "archs, task, criterion and optimizer are known to fairseq without --user-dir")


def check_torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's that is not there
        yield Check("problem", "torch", f"cannot be imported: {error}", "pip install 'torch>=2.6'")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if _numbers(torch.__version__) < [2, 6]:
        yield Check("problem", "torch", torch.__version__, "pip install 'torch>=2.6'")
    else:
        yield Check("ok", "torch", f"{torch.__version__} ({build} build)")
    for index in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
        with torch.cuda.device(index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "bf16 in hardware" if native else "no bf16 in hardware: train with --fp16"
        yield Check("ok" if native else "warn", f"device cuda:{index}", f"{name}, {memory / 2**30:.0f} GiB, {bf16}")
    if not torch.cuda.device_count():
        if shutil.which("nvidia-smi"):
            remedy = "install a CUDA build of torch (pytorch.org/get-started), and check that nvidia-smi works"
            yield Check("warn", "device cuda", "a driver is installed, but torch sees no GPU", remedy)
        found = ", ".join(bf16_instructions())
        bf16 = (
            f"bf16 in hardware ({found}): train with --autocast bf16" if found else "no bf16 in hardware: train in fp32"
        )
        yield Check("ok", "device cpu", f"{usable_cpus()} cores, {bf16}")


def check_apex() -> Iterator[Check]:
    if importlib.util.find_spec("apex") is None:
        yield Check("ok", "apex", "not installed (would add --adam-backend apex; torch's own fused kernels are used)")
    elif importlib.util.find_spec("amp_C") is None:
        detail = (
            "this `apex` is not NVIDIA's, or was built without its CUDA kernels; PyPI's apex is an unrelated package"
        )
        yield Check("warn", "apex", detail, "pip uninstall apex")
    else:
        yield Check("ok", "apex", "NVIDIA's, with CUDA kernels")


def check_triton() -> Iterator[Check]:
    if importlib.util.find_spec("triton"):
        yield Check("ok", "triton", _version("triton"))
        return
    import torch

    if torch.cuda.is_available():
        yield Check("warn", "triton", "not installed: no fused kernels on the GPU", "pip install triton")
    else:
        yield Check("ok", "triton", "not installed (needed on a GPU only)")


def _version(module: str) -> str:
    """Of the distribution that a module comes from: triton is also published as pytorch-triton, tensorboard as
    tb-nightly.
    """
    names = importlib.metadata.packages_distributions().get(module, [])
    return (
        ", ".join(f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names)) or "of unknown version"
    )


def check_tensorboard() -> Iterator[Check]:
    try:
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                writer.add_scalar("check", 1.0, 0)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
    except (ImportError, OSError, AttributeError, TypeError) as error:
        yield Check("problem", "tensorboard", f"cannot write events: {error}", "pip install --upgrade tensorboard")
        return
    yield Check("ok", "tensorboard", f"{_version('tensorboard')}, writes events ({size} bytes)")


def check_sentencepiece() -> Iterator[Check]:
    try:
        import sentencepiece
    except ImportError as error:
        yield Check("problem", "sentencepiece", f"cannot be imported: {error}", "pip install --upgrade sentencepiece")
        return
    yield Check("ok", "sentencepiece", sentencepiece.__version__)


def check_compiler() -> Iterator[Check]:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler:
        yield Check("ok", "g++", compiler)
    else:
        remedy = "install g++ (Debian and Ubuntu: apt-get install g++)"
        yield Check("warn", "g++", "not found: torch.compile cannot be used", remedy)


_EXTRAS = {  # by module: what it adds, and how it is installed
    "transformers": (
        "--hf-model, momentum-lm convert to and from Hugging Face, momentum in models of others",
        "pip install '.[transformers]'",
    ),
    "lm_eval": ("lm_eval --model momentum_lm: the tasks of lm-evaluation-harness", "pip install '.[harness]'"),
}


def check_extras() -> Iterator[Check]:
    """Parts that not everybody needs."""
    for name, (adds, remedy) in _EXTRAS.items():
        if importlib.util.find_spec(name):
            yield Check("ok", name, _version(name))
        else:
            yield Check("ok", name, f"not installed (would add {adds}: {remedy})")


CHECKS: list[Callable[[], Iterator[Check]]] = [
    check_python,
    check_torch,
    check_requirements,
    check_fairseq,
    check_apex,
    check_triton,
    check_tensorboard,
    check_sentencepiece,
    check_extras,
    check_compiler,
]


def _complete(check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What a check finds; where it cannot be made itself, that is the problem, and the others go on."""
    try:
        yield from check()
    except Exception as error:  # whatever a broken installation raises
        detail = f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"
        remedy = "fix the problems above first, or install anew: pip install ."
        yield Check("problem", check.__name__.removeprefix("check_"), detail, remedy)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``momentum-lm doctor``: exit status 1 if there is a problem, else 0 (warnings do not count)."""
    parser = Parser(prog="momentum-lm doctor", description=__doc__.split(": ")[1])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)

    found: list[Check] = []
    for check in CHECKS:
        for result in _complete(check):
            found.append(result)
            if not args.json:
                print(f"{result.status:8} {result.name:14} {result.detail}", flush=True)
                if result.remedy:
                    print(f"{'':23} remedy: {result.remedy}", flush=True)
    problems = sum(result.status == "problem" for result in found)
    if args.json:
        print(json.dumps({"ok": not problems, "checks": [result._asdict() for result in found]}, indent=1))
    else:
        print(
            f"\n{problems} problem{'s' * (problems != 1)}" if problems else "\neverything that training needs is there"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

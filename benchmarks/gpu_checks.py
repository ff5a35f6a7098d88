"""What a GPU has to say in one call of a few minutes: correctness, speed, and whether momentum helps at 30M parameters.

python benchmarks/gpu_checks.py --references --bundle DIR                         beforehand, on a CPU
python benchmarks/gpu_checks.py --bundle DIR --output OUT --minutes 9             the first call on a GPU
python benchmarks/gpu_checks.py --bundle DIR --output OUT --second                what a second call is for
python benchmarks/gpu_checks.py --bundle DIR --output OUT --device cpu --smoke    every stage in miniature
python benchmarks/gpu_results.py OUT                                              then: results/ and the documents

The stages (gpu_registry.py) run one after the other, those that say most first, each in a process of its own until its
time in the schedule. OUT/STAGE.json is written whenever a stage knows something more, so that one which hangs, crashes
or is killed loses only what was still to come, and no other stage; OUT/log.txt has all that they print. What no time is
left for is skipped with a line. gpu_bundle.sh makes DIR, for a machine without network. On a CPU the kernels are
interpreted, which Triton 3.6 (of torch 2.11) can with NumPy before 2.4.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gpu_job import ROOT
from gpu_registry import FIRST, MINUTES, REFERENCES, SECOND, Stage

HERE = Path(__file__).resolve().parent
CLOSING = 3.0  # seconds kept for the end


def environment(device: str, scratch: Path) -> dict[str, str]:
    """Of the stages. What they import comes by PYTHONPATH, as nothing is installed; all share one cache of kernels."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [str(HERE), str(ROOT), *map(os.path.abspath, given)]
    changes = {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        changes |= {
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
    return {**os.environ, **changes}


def run_stage(stage: Stage, seconds: float, args: argparse.Namespace, scratch: Path, log: IO[str]) -> dict:
    """Runs ``stage`` for at most ``seconds``; its record, which is in OUTPUT/NAME.json too."""
    output = args.output / f"{stage.name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu_job.py"), stage.work, "--device", args.device, "--output", str(output)]
    command += ["--bundle", str(args.bundle), "--scratch", str(scratch), "--seconds", f"{seconds:.1f}"] + [
        "--smoke"
    ] * args.smoke
    log.write(f"==== {stage.name}, {seconds:.0f} s at most\n")
    log.flush()
    began = time.monotonic()
    # a session of its own, so that all that it starts ends with it
    process = subprocess.Popen(
        command,
        env=environment(args.device, scratch),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
        status = "ok" if code == 0 else "failed"
        died = f"ended with status {code}" if code > 1 or code < 0 else ""
    except subprocess.TimeoutExpired:
        status, died = "killed", f"killed after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.with_suffix(".part").unlink(missing_ok=True)
    try:
        record = json.loads(output.read_text())
    except (OSError, ValueError):
        record = {"card": args.device, "smoke": args.smoke, "results": {}, "errors": {}}
    if died:
        record["errors"]["process"] = died
    record |= {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - began, 1)}
    output.write_text(json.dumps(record, indent=1))
    return record


def run_stages(stages: Sequence[Stage], args: argparse.Namespace, began: float) -> int:
    """Runs what there is time for; the number of stages that are not whole."""
    args.output.mkdir(parents=True, exist_ok=True)
    ends = began + 60 * args.minutes - CLOSING
    bad = 0
    with (
        tempfile.TemporaryDirectory(prefix="gpu_checks", ignore_cleanup_errors=True) as scratch,
        open(args.output / "log.txt", "a", encoding="utf-8") as log,
        open(args.output / "summary.txt", "a", encoding="utf-8") as summary,
    ):
        due = began
        for stage in stages:
            left = ends - time.monotonic()
            due += (stage.seconds or 0) * args.minutes / MINUTES
            # What the stages before have left over is its own. In miniature there is no schedule: imports take longest.
            share = left if args.smoke or stage.seconds is None else min(left, due - time.monotonic())
            if share <= (0 if args.smoke else stage.least):
                line = f"{stage.name:10} skipped: {max(0.0, share):.0f} s left for it"
                bad += 1
            else:
                record = run_stage(stage, share, args, Path(scratch), log)
                bad += record["status"] != "ok"
                failures = "; ".join(f"{name}: {error}" for name, error in record["errors"].items())
                line = f"{stage.name:10} {record['status']:7} {record['seconds']:6.1f} s"
                line += f"  {stage.summary(record['results'])}"
                line += f"  [{failures}]" * bool(failures)
            for file in (sys.stdout, summary):
                print(line[:1500], file=file, flush=True)
    return bad


def main(argv: Sequence[str] | None = None) -> int:
    """The status is 1 where a stage failed, was killed or skipped."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all of it ends within (default: %(default)g)")
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT", "gpu_checks"), help="folder (default: $OUT, or gpu_checks)"
    )
    parser.add_argument(
        "--bundle", type=Path, default="gpu_bundle", help="folder with references and tokens (default: %(default)s)"
    )
    parser.add_argument("--second", action="store_true", help="the stages of a second call")
    parser.add_argument(
        "--references", action="store_true", help="make BUNDLE/references, on this machine's CPU, and nothing else"
    )
    parser.add_argument("--only", help="names of stages, with commas between")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="everything in miniature")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage ends too
    args.output, args.bundle = Path(args.output).resolve(), args.bundle.resolve()
    stages: Sequence[Stage] = SECOND if args.second else FIRST
    if args.references:
        stages, args.device, args.output = [REFERENCES], "cpu", args.bundle / "references"
    if args.only:
        known = {stage.name: stage for stage in (*FIRST, *SECOND)}
        unknown = [name for name in args.only.split(",") if name not in known]
        if unknown:
            parser.error(f"--only {unknown[0]}: choose from {', '.join(known)}")
        stages = [known[name] for name in args.only.split(",")]
    return int(run_stages(stages, args, began) > 0)


if __name__ == "__main__":
    sys.exit(main())

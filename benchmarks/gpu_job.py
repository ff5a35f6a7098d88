"""What a stage of gpu_checks.py gets in its process: where to compute, how long, and a place for its numbers."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """``output``: the stage's JSON; ``bundle``: references and tokens made beforehand; ``work``: a scratch folder."""

    device: str
    smoke: bool
    bundle: Path
    work: Path
    output: Path
    ends: float  # on the clock of time.monotonic
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the stage is killed."""
        return self.ends - time.monotonic()

    def record(self, **values: Any) -> None:
        """Adds to the results, and writes all of them: a stage that is killed keeps what it recorded."""
        self.results |= values
        gpu = self.device == "cuda" and "torch" in sys.modules
        card = sys.modules["torch"].cuda.get_device_name() if gpu else self.device
        temporary = self.output.with_suffix(".part")
        known = {"stage": self.output.stem, "card": card, "smoke": self.smoke}
        state = {
            "status": "unfinished",
            "seconds": round(time.monotonic() - self.began, 1),
        }  # until gpu_checks.py knows
        temporary.write_text(json.dumps({**known, **state, "results": self.results, "errors": self.errors}, indent=1))
        os.replace(temporary, self.output)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part whose failure is recorded and does not end the stage."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.record()
        print(f"{name}: {time.monotonic() - began:.1f} s, {self.left():.0f} s left", flush=True)


def keep_compiled(device: str) -> None:
    """Lets torch.compile keep a form of a function for each of a stage's models: after eight it compiles no more."""
    if device == "cuda":
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64


def main(argv: list[str] | None = None) -> int:
    """Runs one stage: started by gpu_checks.py. The status is 1 where a part of it failed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("work", help="MODULE:FUNCTION")
    parser.add_argument("--device", required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args(argv)
    ends = time.monotonic() + args.seconds
    job = Job(args.device, args.smoke, args.bundle, args.scratch, args.output, ends)
    module, _, function = args.work.partition(":")
    with job.part("stage"):
        getattr(importlib.import_module(module), function)(job)
    job.record()
    return int(bool(job.errors))


if __name__ == "__main__":
    sys.exit(main())

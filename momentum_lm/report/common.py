"""What the reports of all tasks share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momentum_lm.errors import UserError
from momentum_lm.files import check_folder
from momentum_lm.results.ownership import EVENTS
from momentum_lm.results.records import read_results
from momentum_lm.untrusted import legible

if TYPE_CHECKING:
    from .tensorboard import TrainingLog

Folder = str | os.PathLike[str]


def read_runs(folders: Sequence[Folder], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The results of all folders. Raises UserError unless they are of one task, one of ``tasks``, and hold finished runs."""
    found: list[dict[str, Any]] = []
    for folder in folders:
        results = read_results(folder)
        if results["task"] not in tasks:
            raise UserError(
                f"{folder} holds results of {legible(str(results['task']), 60)}, and not of {' or '.join(tasks)}"
            )
        if found and results["task"] != found[0]["task"]:
            raise UserError(
                f"{folder} holds results of {results['task']}, which cannot stand beside those of {found[0]['task']} "
                f"in {folders[0]}; name folders of one task"
            )
        if not results["runs"]:
            raise UserError(f"{folder} holds no finished run of {results['task']}; run the evaluation again")
        found.append(results)
    return found


def short_names(folders: Sequence[Folder]) -> list[str]:
    """The folders' paths without the parts that all of them share at the beginning and at the end.

    Raises UserError where two are the same.
    """
    parts = [
        [os.fsencode(part).decode("utf-8", "replace") for part in Path(folder).resolve().parts] for folder in folders
    ]
    if len({tuple(p) for p in parts}) < len(parts):
        raise UserError("the same results folder is named twice")
    if len(parts) == 1:
        return [parts[0][-1]]
    for end in (-1, 0):
        while len({p[end] for p in parts if p}) == 1 and all(parts):
            for p in parts:
                del p[end]
    return ["/".join(p) or "." for p in parts]


def replace_events(folder: Folder, hparams: Mapping[str, Any], write: Callable[[TrainingLog], None]) -> None:
    """Puts what ``write`` logs into ``tensorboard`` of a results folder, in place of the events that an earlier call
    put there; what others log there, such as a training run, stays. Raises UserError where ``tensorboard`` is no
    folder."""
    from .tensorboard import TrainingLog  # which imports torch

    home = Path(folder) / "tensorboard"
    check_folder(home)
    before = _events(home)
    try:
        with TrainingLog(home, hparams, EVENTS) as log:
            write(log)
    except BaseException:
        for path in _events(home) - before:
            path.unlink()
        with contextlib.suppress(OSError):  # not empty
            home.rmdir()
        raise
    for path in before:
        path.unlink()


def _events(home: Path) -> set[Path]:
    """The event files of ours."""
    return {path for path in home.glob(f"events.out.tfevents.*{EVENTS}") if path.is_file() and not path.is_symlink()}

"""What the reports of all studies share: reading results, the page of one folder, and several folders side by side."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from momentum_lm.errors import UserError
from momentum_lm.files import check_folder
from momentum_lm.results.ownership import EVENTS
from momentum_lm.results.records import read_results
from momentum_lm.untrusted import legible

from .figures import read_png, save_png
from .html import Code, Folded, Paragraph, Part, Points, Verdict, write_page
from .tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tensorboard import TrainingLog

Folder = str | os.PathLike[str]
Sections = dict[str, Sequence[Part]]  # heading -> parts


def read_runs(folders: Sequence[Folder], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The results of all folders. Raises UserError unless they are of one task, one of ``tasks``, and hold finished
    runs."""
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


@dataclass(frozen=True)
class Report:
    """The page, the pictures and the TensorBoard events of one results folder.

    ``table``: the runs' table, also for the terminal. ``sections(folder, results, save)``: the page's own sections,
    between the model's name and its configuration; ``save(name, figure)`` writes a figure as ``name.png``. ``log(log,
    results)`` writes events and returns the metrics of the HParams tab; with ``images`` the pictures are among the
    events.
    """

    task: str
    title: str
    table: Callable[[Sequence[Any]], Table]
    sections: Callable[[Path, dict[str, Any], Callable[[str, Figure], None]], Sections]
    log: Callable[[TrainingLog, dict[str, Any]], Mapping[str, float]]
    images: bool = False

    def write(self, folder: Folder, replace: bool = False) -> Table:
        """Writes ``report.html``, pictures and events beside a ``results.json``; returns its table.

        Raises UserError for results of other tasks, or without a finished run, and for files of these names that are
        not ours, unless ``replace``.
        """
        home, pictures = Path(folder), list[str]()
        (results,) = read_runs([folder], [self.task])

        def save(name: str, figure: Figure) -> None:
            save_png(figure, home / f"{name}.png", replace)
            pictures.append(name)

        def write_events(log: TrainingLog) -> None:
            final = self.log(log, results)
            for name in pictures if self.images else ():
                log.image(name, read_png(home / f"{name}.png"))
            log.hparams_with_metrics(final, 0)

        own = self.sections(home, results, save)
        sections: Sections = {"": [Paragraph(f"Model: {_model_text(results)}"), *own.pop("", [])], **own}
        details = json.dumps({name: results[name] for name in ("model", "config")}, indent=1, ensure_ascii=False)
        sections["What was measured"] = [Folded("Model and configuration", [Code(details)])]
        if results["config"].get("command"):
            sections["How to run it again"] = [Code(results["config"]["command"])]
        write_page(home / "report.html", self.title, sections, replace)
        config = {key: value for key, value in results["config"].items() if key not in ("datasets", "command")}
        hparams = {"model": results["model"]["path"], **config, **results["model"].get("architecture", {})}
        replace_events(home, hparams, write_events)
        return self.table(results["runs"])


class Comparison:
    """Results folders side by side; differences are from the first. ``notes``: what must be known to read them.

    Raises UserError for folders of other tasks, those without a finished run, and a folder that is named twice.
    """

    task: ClassVar[str]
    title: ClassVar[str]  # of the page

    def __init__(self, folders: Sequence[Folder], names: Sequence[str] | None = None, seed: int = 0) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.results = read_runs(folders, [self.task])
        self.names = list(names) if names else short_names(folders)
        self.seed = seed
        self.notes: list[str] = []

    def table(self) -> Table:
        """A row for each setting and folder."""
        raise NotImplementedError

    def reading(self) -> str:
        """How to read the table; empty where there is nothing to say."""
        raise NotImplementedError

    def conclusions(self) -> list[str]:
        """What came out, in sentences; empty where nothing compares."""
        return []

    def sections(self) -> Sections:
        """The page's figures and further tables."""
        raise NotImplementedError

    def tables(self) -> list[Table]:
        """What comes first, on a terminal too."""
        return [self.table()]

    def write_page(self, path: Folder) -> None:
        """One HTML page: what came out, plots, tables, and in what the folders' configurations differ."""
        top: list[Part] = [Verdict(said)] if (said := self.conclusions()) else []
        top += [Points(self.notes)] if self.notes else []
        sections: Sections = {"": top, **self.sections(), "All numbers": self.tables()}
        sections["How to read this"] = [Paragraph(self.reading())] if self.reading() else []
        sections["What was measured"] = [Code(self._origins())]
        write_page(path, self.title, sections)

    def _origins(self) -> str:
        """Each folder's model, and the entries of the configurations, of study and model, that are not the same in
        all."""
        hidden = ("datasets", "command")
        configs = [
            {k: v for k, v in (results["config"] | results["model"].get("architecture", {})).items() if k not in hidden}
            for results in self.results
        ]
        keys = dict.fromkeys(key for config in configs for key in config)
        differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
        lines = []
        for name, results, config in zip(self.names, self.results, configs, strict=True):
            lines.append(f"{name}: {_model_text(results)}")
            lines += [f"  {key}: {json.dumps(config.get(key), ensure_ascii=False)}" for key in differing]
        return "\n".join(lines)


def _model_text(results: Mapping[str, Any]) -> str:
    """Where the model lies, and what was taken out of it."""
    out = results["model"].get("architecture", {}).get("without_momentum")
    names = f", without the filters {', '.join(map(str, out))}" if isinstance(out, list) else ""
    return f"{results['model']['path']}{names}"


def differ(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether both runs have an entry, and not the same one."""
    return name in one and name in other and one[name] != other[name]


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

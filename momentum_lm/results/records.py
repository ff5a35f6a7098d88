"""Result folders: what was measured, on what, and which measurements are still to do."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError
from momentum_lm.files import atomic_write, check_writable, naming, write_json

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"
_READ = {  # what the reports read of a run
    "lm_perplexity": "split context_length perplexity ci95 bits_per_byte num_tokens num_documents data_sha256 documents".split(),
    "icl_classification": "dataset seed shots order calibration shots_fitted num_examples accuracy ci95 macro_f1 majority "
    "confusion".split(),
    "icl_finetune_analysis": "dataset seed shots num_examples finetune_lr accuracy rec2ftp_counts paper corrected baselines".split(),
}


class Results:
    """``results.json`` of one task and one model, written anew, atomically, after every finished run (one entry of
    ``runs``).

    ``config`` holds everything that the numbers depend on, apart from what ``key`` names. Opening a folder whose
    results have the same task, model and config goes on with them; a folder with others is refused unless ``force``,
    which begins anew. Entries called ``path`` or ``command`` are for the reader and not compared, and of
    ``config.datasets`` those that both have: a later evaluation may add others. Nothing is written, and with ``force``
    nothing replaced, before the first run is added. ``summarise`` maps the runs to ``summary``, an entry beside them.

    Raises UserError for a folder of other results, a file that cannot be read, or a folder that cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        task: str,
        model: Mapping[str, Any],
        config: Mapping[str, Any],
        key: Iterable[str],
        force: bool = False,
        summarise: Callable[[list[dict[str, Any]]], Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._summarise = summarise
        self.key = tuple(key)
        self.data: dict[str, Any] = {"task": task, "model": _plain(model), "config": _plain(config), "runs": []}
        if not force and (self.folder / RESULTS).exists():
            old = read_results(self.folder)
            for name in ("task", "model", "config"):
                difference = _difference(old[name], self.data[name], name)
                if difference:
                    raise UserError(
                        f"{self.folder / RESULTS} holds other results ({difference}); "
                        "choose another --results-dir, or add --force to replace them"
                    )
            self.data["runs"] = old["runs"]
            if "datasets" in old["config"]:
                self.data["config"]["datasets"] = old["config"]["datasets"] | self.data["config"]["datasets"]
        check_writable(self.folder, "--results-dir")  # now, not after hours of scoring

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Finished runs, in the order in which they were added."""
        return self.data["runs"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The finished run with these values of ``key``, if there is one."""
        return next((run for run in self.runs if all(run[name] == key[name] for name in self.key)), None)

    def add(self, run: Mapping[str, Any]) -> None:
        """Adds a finished run, in place of one with the same key, and writes the file."""
        run = _plain(run)
        kept = [old for old in self.runs if any(old[name] != run[name] for name in self.key)]
        self.data["runs"] = [*kept, run]
        if self._summarise is not None:
            self.data["summary"] = self._summarise(self.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RESULTS, self.data)


class Predictions:
    """``predictions.jsonl``: one line, or ``settings`` of them, for every example of every finished run of a :class:`Results`.

    ``runs`` holds the keys of the runs that are finished and all there; the lines of others are removed when the next run is added.
    """

    def __init__(self, results: Results, settings: int = 1) -> None:
        self.path = results.folder / PREDICTIONS
        self.key = results.key
        lines: dict[tuple[Any, ...] | None, int] = collections.Counter(run for run, _ in self._lines())
        finished = {tuple(run[name] for name in self.key): run["num_examples"] for run in results.runs}
        self.runs = {run for run, count in finished.items() if lines[run] == settings * count}
        self._others = bool(lines.keys() - self.runs)

    def add(self, run: tuple[Any, ...], lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends the lines of one run, and waits until they are on disk. The run itself is to be added to the results next."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._others:
            with atomic_write(self.path) as file:
                file.writelines(line for kept, line in self._lines() if kept in self.runs)
            self._others = False
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(_plain(line), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs.add(run)

    def _lines(self) -> Iterator[tuple[tuple[Any, ...] | None, str]]:
        """(run's key, line); None for a line that was cut short."""
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    yield tuple(entry[name] for name in self.key), line
                except (ValueError, KeyError, TypeError):
                    yield None, line


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``results.json`` of a folder (or the file itself). Raises UserError where it is missing or not one of ours."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; name a folder that fairseq-eval wrote") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it or choose another folder") from error
    if not isinstance(data, dict) or not {"task", "model", "config", "runs"} <= data.keys():
        raise UserError(f"{path} is not a results file: it needs task, model, config and runs")
    if problem := _damage(data):
        raise UserError(f"{path} is damaged ({problem}); delete it or choose another folder")
    return data


def _damage(data: dict[str, Any]) -> str:
    """What is not as :class:`Results` writes it, in words; empty if nothing."""
    for name, kind in (("task", str), ("model", dict), ("config", dict), ("runs", list)):
        if not isinstance(data[name], kind):
            return f"{name} is a {type(data[name]).__name__}"
    for number, run in enumerate(data["runs"]):
        lacks = [name for name in _READ.get(data["task"], ()) if not isinstance(run, dict) or name not in run]
        if lacks:
            return f"run {number} has no {lacks[0]}"
    return ""


def _plain(value: Any) -> Any:
    """What the value is after a journey through JSON, so that it compares equal to what is read back. NaN:
    ValueError."""
    return json.loads(json.dumps(value, allow_nan=False))


def _difference(old: Any, new: Any, name: str) -> str:
    """The first place where two JSON values differ, in words; empty if none."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() & new.keys() if name == "config.datasets" else (old.keys() | new.keys()) - {"path", "command"}
        found = (_difference(old.get(k), new.get(k), f"{name}.{k}") for k in sorted(keys))
        return next((text for text in found if text), "")
    return "" if old == new else f"{name}: {_brief(old)} there, {_brief(new)} now"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""``results.json``, ``predictions.jsonl`` and ``samples.json`` of a results folder: what was measured, on what, and
what is still to do."""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from momentum_lm.errors import UserError, arg
from momentum_lm.files import (
    appending,
    atomic_write,
    check_folder,
    check_ordinary,
    check_writable,
    locked,
    reading,
    write_json,
)
from momentum_lm.untrusted import parse_json, read_json

from .identity import FOR_THE_READER, compared, digest
from .ownership import PAGE, check_ours, check_pictures
from .schema import Prediction, Sample, problem, results_problem

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"
SAMPLES = "samples.json"
PAGE_NAME = "report.html"
FOLDERS = ("scores", "documents", "traces", "tensorboard")
_LINE_BYTES = 16 << 20  # of a prediction
_REMEDY = ("choose another ", arg("folder"), ", or add ", arg(force=True), " to replace")
# of which a run's digest is made, where it has them, beside the model and the configuration
_DEPENDS_ON = ("prompts_sha256", "examples_sha256", "demonstrations_sha256", "data_sha256")


@contextlib.contextmanager
def results_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """The folder for this process alone. Open a :class:`Results` within it, never before: another process may be adding
    to it.

    Raises UserError for a folder that cannot be written, or is being written.
    """
    check_writable(folder, "folder")  # now, not after hours of scoring
    with locked(folder):
        yield


class Results:
    """``results.json`` of one task and one model, written anew, atomically, after every finished run (one entry of
    ``runs``).

    ``config`` holds everything that the numbers depend on, apart from what ``key`` names. Opening a folder whose
    results have the same task, model and config goes on with them; a folder with others is refused unless ``force``,
    which begins anew. Entries for the reader (``path``, ``command``, ``versions``) are not compared, and of
    ``config.datasets`` those that both have: a later evaluation may add others. Every run carries a ``digest`` of all
    that it depends on, its prompts' tokens included. Nothing is written, and with ``force`` nothing replaced, before
    the first run is added. ``summarise`` maps the runs to ``summary``, an entry beside them.

    Raises UserError for a folder of other results or of an older version, a file that cannot be read, a folder that
    cannot be written, and for files of these names that are not ours.
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
        self.force = force
        self._summarise = summarise
        self.key = tuple(key)
        self.data: dict[str, Any] = {"task": task, "model": _plain(model), "config": _plain(config), "runs": []}
        check_ordinary(self.folder / RESULTS)
        for name in FOLDERS:
            check_folder(self.folder / name)
        if not force:
            check_ours(self.folder / PAGE_NAME, PAGE)
            check_pictures(self.folder, self.data["config"].get("datasets", ()))
            if (self.folder / RESULTS).exists():
                self._go_on(read_results(self.folder))
        check_writable(self.folder, "folder")

    def _go_on(self, old: dict[str, Any]) -> None:
        path = self.folder / RESULTS
        if old["task"] == self.data["task"] and "revision" in self.data["config"] and "revision" not in old["config"]:
            raise UserError(
                f"{path} was written by an older version, whose records do not say all that their numbers depend on; "
                "choose another ",
                arg("folder"),
                ", or add ",
                arg(force=True),
                " to start anew (`momentum-lm report` reads it as it is)",
            )
        for name in ("task", "model", "config"):
            difference = _difference(old[name], self.data[name], name)
            if difference:
                raise UserError(f"{path} holds other results ({difference}); ", *_REMEDY, " them")
        self.data["runs"] = old["runs"]
        if "datasets" in old["config"]:
            self.data["config"]["datasets"] = old["config"]["datasets"] | self.data["config"].get("datasets", {})
        for number, run in enumerate(self.runs):
            if run.get("digest") != self._digest(run):
                raise UserError(
                    f"{path}: run {number} was measured on something else than the file says (its digest); ",
                    *_REMEDY,
                    " them",
                )

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Finished runs, in the order in which they were added."""
        return self.data["runs"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The finished run with these values of ``key``, if there is one."""
        return next((run for run in self.runs if all(run[name] == key[name] for name in self.key)), None)

    def add(self, run: Mapping[str, Any]) -> None:
        """Adds a finished run, in place of one with the same key, and writes the file."""
        run = dict(_plain(run))
        run["digest"] = self._digest(run)
        kept = [old for old in self.runs if any(old[name] != run[name] for name in self.key)]
        self.data["runs"] = [*kept, run]
        if self._summarise is not None:
            self.data["summary"] = self._summarise(self.runs)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RESULTS, self.data)

    def _digest(self, run: Mapping[str, Any]) -> str:
        config = {name: value for name, value in self.data["config"].items() if name != "datasets"}
        dataset = self.data["config"].get("datasets", {}).get(run.get("dataset"))
        found = {name: run.get(name) for name in (*self.key, *_DEPENDS_ON)}
        about = {"task": self.data["task"], "model": self.data["model"], "config": config}
        return digest(compared(about | {"dataset": dataset, "run": found}))


class Predictions:
    """``predictions.jsonl``: one line, or ``settings`` of them, for every example of every finished run of a
    :class:`Results`.

    ``runs`` holds the keys of the runs that are finished and all there; the lines of others are removed when the next
    run is added. Raises UserError for a file with lines that are not ours, unless the results replace what is there.
    """

    def __init__(self, results: Results, settings: int = 1) -> None:
        self.path = results.folder / PREDICTIONS
        self.key = results.key
        check_ordinary(self.path)
        lines: dict[tuple[Any, ...] | None, int] = collections.Counter(run for run, _ in self._lines(results.force))
        finished = {tuple(run[name] for name in self.key): run["num_examples"] for run in results.runs}
        self.runs = {run for run, count in finished.items() if lines[run] == settings * count}
        self._others = bool(lines.keys() - self.runs)

    def add(self, run: tuple[Any, ...], lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends the lines of one run, and waits until they are on disk. The run itself is to be added to the results
        next."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._others:
            with atomic_write(self.path, "wb") as file:
                file.writelines(line for kept, line in self._lines(True) if kept in self.runs)
            self._others = False
        with appending(self.path, sync=True) as file:
            for entry in lines:
                file.write(json.dumps(_plain(entry), ensure_ascii=False) + "\n")
        self.runs.add(run)

    def _lines(self, force: bool) -> Iterator[tuple[tuple[Any, ...] | None, bytes]]:
        """(run's key, line); None for a line that was cut short, and with ``force`` for one that is not ours."""
        if not self.path.exists():
            return
        for number, line in prediction_lines(self.path):
            entry, wrong = prediction(line)
            if wrong or not entry.keys() >= set(self.key):
                if not (force or _cut_short(line)):
                    raise UserError(
                        f"{self.path}, line {number} is damaged or not a prediction of ours "
                        f"({wrong or 'other keys'}); move the file, ",
                        *_REMEDY,
                        " it",
                    )
                yield None, line
            else:
                yield tuple(entry[name] for name in self.key), line


class Samples:
    """``samples.json``: the first prompt of each dataset and number of shots, for people to look at. Raises UserError
    for a file that is not ours, unless the results replace what is there."""

    def __init__(self, results: Results) -> None:
        self.path = results.folder / SAMPLES
        check_ordinary(self.path)
        there = [] if results.force or not self.path.exists() else read_samples(self.path)
        self._samples = there if results.runs else []

    def __contains__(self, place: tuple[str, int]) -> bool:
        return any((sample["dataset"], sample["shots"]) == place for sample in self._samples)

    def add(self, sample: Mapping[str, Any]) -> None:
        self._samples.append(_plain(sample))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._samples)


def say_finished(folder: str | os.PathLike[str]) -> None:
    """For a command that finds all its work done."""
    print(f"{os.fspath(folder)} holds all of these results already; nothing was scored. --force measures anew.\n")


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``results.json`` of a folder (or the file itself). Raises UserError where it is missing or not one of ours."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    try:
        data = read_json(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; name a folder that fairseq-eval wrote"
        ) from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it or choose another folder") from error
    if not isinstance(data, dict) or not {"task", "model", "config", "runs"} <= data.keys():
        raise UserError(f"{path} is not a results file: it needs task, model, config and runs")
    if wrong := results_problem(data):
        raise UserError(f"{path} is damaged ({wrong}); delete it or choose another folder")
    return data


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The prompts of a ``samples.json``. Raises UserError for a file that is damaged or not ours."""
    try:
        samples = read_json(path)
        wrong = problem(samples, list[Sample], "a sample")
        if not wrong and not samples:
            wrong = "it is empty"
        outside = next((s for s in samples if s["gold"] >= len(s["continuations"])), None) if not wrong else None
        wrong = wrong or ("a sample: gold is none of its continuations" if outside else "")
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error
    except UserError:
        raise
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise UserError(
            f"{os.fspath(path)} is damaged or not ours ({wrong}); move it away and run the evaluation again"
        )
    return samples


def prediction_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a ``predictions.jsonl``. Raises OSError, and UserError for a line of many megabytes."""
    with reading(path) as file:
        for number in range(1, 1 << 62):
            line = file.readline(_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > _LINE_BYTES:
                raise UserError(
                    f"{path}, line {number} is longer than {_LINE_BYTES >> 20} MB, as no prediction is; run the "
                    f"evaluation again"
                )
            yield number, line


def prediction(line: bytes) -> tuple[dict[str, Any], str]:
    """A line of predictions, and what is wrong with it: empty if nothing."""
    try:
        entry = parse_json(line, strict=True)
    except ValueError as error:
        return {}, str(error)
    if type(entry) is dict:  # the usual way, in a fifth of the time of `problem`
        numbers = [entry.get(name, 0) for name in ("order", "seed", "shots", "index", "gold", "pred")]
        names = entry.get("dataset"), entry.get("calibration", "")
        plain = all(type(number) is int and 0 <= number < 1 << 31 for number in numbers) and all(
            type(name) is str for name in names
        )
        if plain and entry.keys() >= Prediction.__required_keys__:
            return entry, ""
    return ({}, wrong) if (wrong := problem(entry, Prediction, "")) else (entry, "")


def _cut_short(line: bytes) -> bool:
    """Whether a line that does not parse is the beginning of one of ours: a kill left it."""
    begins = b'{"dataset": '
    return not line.endswith(b"\n") and (line.startswith(begins) or begins.startswith(line))


def _plain(value: Any) -> Any:
    """What the value is after a journey through JSON, so that it compares equal to what is read back. Half a surrogate
    pair, as a path that is not UTF-8 has it, becomes U+FFFD. NaN: ValueError."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return json.loads(
        text.encode("utf-8", "surrogateescape" if _escapes(text) else "replace").decode("utf-8", "replace")
    )


def _escapes(text: str) -> bool:
    """Whether the text encodes with the half surrogates that stand for bytes of a path."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _difference(old: Any, new: Any, name: str) -> str:
    """The first place where two JSON values differ, in words; empty if none."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() & new.keys() if name == "config.datasets" else (old.keys() | new.keys()) - set(FOR_THE_READER)
        found = (
            _difference(old.get(k), new.get(k), f"{name}.{k}") for k in sorted(keys, key=lambda k: (k == "datasets", k))
        )
        return next((text for text in found if text), "")
    return "" if old == new else f"{name}: {_brief(old)} there, {_brief(new)} now"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

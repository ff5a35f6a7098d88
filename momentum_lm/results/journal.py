"""Scores on disk: one line for every finished batch, one file for a finished unit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from momentum_lm.errors import UserError, arg
from momentum_lm.files import NPZ_ERRORS, appending, atomic_write, check_folder, read_arrays, reading
from momentum_lm.icl.engine import Scores
from momentum_lm.untrusted import parse_json

from .ownership import ARRAYS, check_ours
from .schema import JournalBatch, JournalHead, problem

_LINE_BYTES = 64 << 20  # of a batch
_NUMBER = re.compile(r"[0-9]{1,9}")


class Journal:
    """The scores of one unit under ``folder``: ``<name>.npz`` once it is finished, until then ``<name>.<rank>.jsonl``.

    ``fingerprint`` identifies model and prompts: what was written under another one is of no use and is
    overwritten. A line that was cut short by a kill is left out, and so is what follows it. Files of these names that
    are not ours are neither read nor removed; where one is in the way, :meth:`begin` raises UserError, unless
    ``force``.
    """

    def __init__(
        self, folder: str | os.PathLike[str], name: str, fingerprint: str, rank: int = 0, force: bool = False
    ) -> None:
        self.folder, self.name, self.fingerprint, self.force = Path(folder), name, fingerprint, force
        check_folder(self.folder)
        self._mine = self.folder / f"{name}.{rank}.jsonl"
        self._whole = self.folder / f"{name}.npz"
        self.batch_tokens: int | None = None  # with which the batches found were planned
        # by number; what any process finished before this one began
        self.batches: dict[int, dict[int, list[float]]] = {}
        for path in self._files():
            self._read(path)

    def scores(self, choices: Sequence[int]) -> Scores | None:
        """The scores of a finished unit, whose queries have so many ``choices`` each; None where there are none, or
        others."""
        try:
            arrays = read_arrays(self._whole)
            if str(arrays["fingerprint"]) != self.fingerprint:
                return None
            sums, counts = arrays["sums"], arrays["counts"]
        except (*NPZ_ERRORS, UserError):  # none, or damaged: it is scored anew
            return None
        there = np.arange(max(choices))[None] < np.asarray(choices)[:, None]
        whole = sums.shape == counts.shape == there.shape and sums.dtype == np.float64 and counts.dtype == np.int64
        if not whole or not np.array_equal(np.isfinite(sums), there) or not np.array_equal(counts > 0, there):
            return None
        return Scores(sums, counts)

    def begin(self, batch_tokens: int, batches: Sequence[Sequence[int]], choices: Sequence[int]) -> None:
        """Opens this process's file, keeping the finished batches that were planned with the same ``batch_tokens``: of
        the numbers, queries and ``choices`` a query that ``batches`` has."""
        if batch_tokens != self.batch_tokens:
            self.batches = {}
        self.batch_tokens = batch_tokens
        self.batches = {number: sums for number, sums in self.batches.items() if _fits(number, sums, batches, choices)}
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.force:
            check_ours(self._whole, ARRAYS)
            if self._mine.exists() and self._head(self._mine) is None:
                raise UserError(f"{self._mine} is there and not ours; move it away, or choose another ", arg("folder"))
        with atomic_write(self._mine) as file:
            file.write(json.dumps({"fingerprint": self.fingerprint, "batch_tokens": batch_tokens}) + "\n")
            for number, sums in self.batches.items():
                file.write(_line(number, sums))

    def add(self, number: int, sums: Mapping[int, list[float]]) -> None:
        """Records a finished batch: {query: sums of its choices}."""
        self.batches[number] = dict(sums)
        with appending(self._mine) as file:
            file.write(_line(number, sums))

    def finish(self, scores: Scores) -> None:
        """Writes the unit's file and removes the processes' files."""
        with atomic_write(self._whole, "wb") as file:  # the fingerprint first: it is the mark that the file is ours
            np.savez_compressed(file, fingerprint=np.array(self.fingerprint), sums=scores.sums, counts=scores.counts)
        for path in self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        """What processes wrote about this unit: of our names, and begun as ours are."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        ours = re.compile(rf"{re.escape(self.name)}\.\d+\.jsonl")
        paths = [self.folder / name for name in sorted(names) if ours.fullmatch(name)]
        return [path for path in paths if self._head(path) is not None]

    def _head(self, path: Path) -> dict[str, Any] | None:
        return next(_entries(path), None)

    def _read(self, path: Path) -> None:
        lines = _entries(path)
        first = next(lines, None)
        if (
            first is None
            or first["fingerprint"] != self.fingerprint
            or self.batch_tokens not in (None, first["batch_tokens"])
        ):
            return
        self.batch_tokens = first["batch_tokens"]
        for entry in lines:
            self.batches[entry["batch"]] = {int(query): sums for query, sums in entry["sums"].items()}


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The head and the batches of a process's file, up to a line that is damaged; nothing of a file that is not
    ours."""
    try:
        with reading(path) as file:
            kind: Any = JournalHead
            while (line := file.readline(_LINE_BYTES)).endswith(b"\n"):
                entry = parse_json(line, strict=True)
                if problem(entry, kind, ""):
                    return
                if kind is JournalBatch and not all(map(_NUMBER.fullmatch, entry["sums"])):
                    return
                kind = JournalBatch
                yield entry
    except (OSError, ValueError):  # killed while writing, or no file to read
        return


def _fits(
    number: int, sums: Mapping[int, list[float]], batches: Sequence[Sequence[int]], choices: Sequence[int]
) -> bool:
    return (
        number < len(batches)
        and set(sums) == set(batches[number])
        and all(len(sums[query]) == choices[query] for query in sums)
    )


def _line(number: int, sums: Mapping[int, list[float]]) -> str:
    return json.dumps({"batch": number, "sums": sums}) + "\n"

"""Scores on disk: one line for every finished batch, one file for a finished unit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from momentum_lm.files import NPZ_ERRORS, atomic_write, naming
from momentum_lm.icl.scoring import Scores


class Journal:
    """The scores of one unit under ``folder``: ``<name>.npz`` once it is finished, until then ``<name>.<rank>.jsonl``.

    ``fingerprint`` tells what was asked of which model: what was written under another one is of no use and is overwritten. A line
    that was cut short by a kill is left out, and so is what follows it.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, fingerprint: str, rank: int = 0) -> None:
        self.folder, self.name, self.fingerprint = Path(folder), name, fingerprint
        self._mine = self.folder / f"{name}.{rank}.jsonl"
        self.batch_tokens: int | None = None  # with which the batches found were planned
        self.batches: dict[int, dict[int, list[float]]] = {}  # by number; what any process finished before this one began
        for path in sorted(self.folder.glob(f"{name}.*.jsonl")):
            self._read(path)

    def scores(self) -> Scores | None:
        """The scores of a finished unit."""
        path = self.folder / f"{self.name}.npz"
        try:
            with np.load(path) as arrays:
                if str(arrays["fingerprint"]) == self.fingerprint:
                    return Scores(arrays["sums"], arrays["counts"])
        except NPZ_ERRORS:  # none, or damaged: it is scored anew
            pass
        return None

    def begin(self, batch_tokens: int) -> None:
        """Opens this process's file, keeping the finished batches that were planned with the same ``batch_tokens``."""
        if batch_tokens != self.batch_tokens:
            self.batches = {}
        self.batch_tokens = batch_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._mine) as file:
            file.write(json.dumps({"fingerprint": self.fingerprint, "batch_tokens": batch_tokens}) + "\n")
            for number, sums in self.batches.items():
                file.write(_line(number, sums))

    def add(self, number: int, sums: Mapping[int, list[float]]) -> None:
        """Records a finished batch: {query: sums of its choices}."""
        self.batches[number] = dict(sums)
        with naming(self._mine), open(self._mine, "a", encoding="utf-8") as file:
            file.write(_line(number, sums))

    def finish(self, scores: Scores) -> None:
        """Writes the unit's file and removes the processes' files."""
        with atomic_write(self.folder / f"{self.name}.npz", "wb") as file:
            np.savez_compressed(file, sums=scores.sums, counts=scores.counts, fingerprint=np.array(self.fingerprint))
        for path in self.folder.glob(f"{self.name}.*.jsonl"):
            path.unlink()

    def _read(self, path: Path) -> None:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:  # killed while writing
                    return
                if "batch" in entry:
                    self.batches[entry["batch"]] = {int(query): sums for query, sums in entry["sums"].items()}
                elif entry["fingerprint"] != self.fingerprint or self.batch_tokens not in (None, entry["batch_tokens"]):
                    return
                else:
                    self.batch_tokens = entry["batch_tokens"]


def _line(number: int, sums: Mapping[int, list[float]]) -> str:
    return json.dumps({"batch": number, "sums": sums}) + "\n"

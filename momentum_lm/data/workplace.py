"""The folder where ``momentum-lm prepare`` works until all is done, and how its files get to their place.

``OUTPUT/.prepare`` holds ``config.json`` (the settings), ``plan.json`` and the tokenizer (splits and vocabulary are settled),
``state.json`` (how far the ``.partial`` token files are good) and at last ``prepare.json`` (all is made, only to be moved).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from momentum_lm import __version__
from momentum_lm.data.indexed import IndexedDataset, IndexedDatasetWriter
from momentum_lm.data.selection import SPLITS
from momentum_lm.data.sources import Interrupted
from momentum_lm.data.tokenizer import load_tokenizer
from momentum_lm.errors import UserError
from momentum_lm.files import write_json

TOKENIZER_FILES = ("sentencepiece.model", "encoder.json", "vocab.bpe", "tokenizer.json", "tokenizer_config.json")
OUTPUTS = (*(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx")), "dict.txt", *TOKENIZER_FILES)
_PACKAGES = {"sentencepiece": "sentencepiece", "gpt2_bpe": "regex", "huggingface": "tokenizers"}


@contextlib.contextmanager
def workplace(output: Path, wanted: dict[str, Any], force: bool) -> Iterator[Path]:
    """``output/.prepare``, locked, with the unfinished work of the same settings if any. Removed when the work is done or worthless.

    Raises UserError while another process is at work there, and for unfinished work of other settings unless ``force``.
    """
    work = output / ".prepare"
    created = not output.exists()
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        if not _locked(lock):
            raise UserError(f"another prepare is at work in {output}; wait for it, or use another --output")
        before = read_json(work / "config.json")
        if before is not None and before != wanted and not force and _has_results(work):
            other = difference(before, wanted)
            raise UserError(f"{output} holds unfinished work with {other}; use another --output, or --force to drop it")
        if before != wanted:
            for file in work.iterdir():
                if file.name != "lock":
                    file.unlink()
            write_json(work / "config.json", wanted)
        try:
            yield work
        except BaseException as error:
            # Where the input has to change before this can go on, the work so far will not fit it
            input_is_wrong = isinstance(error, UserError) and not isinstance(error, Interrupted)
            if input_is_wrong or not _has_results(work):
                shutil.rmtree(work)
                if created:
                    output.rmdir()
            raise
        shutil.rmtree(work)


def _has_results(work: Path) -> bool:
    return (work / "plan.json").exists()


def clear_away(output: Path, wanted: dict[str, Any]) -> None:
    """Removes the empty workplace of a run that was killed after its last file had been moved."""
    work = output / ".prepare"
    if (read_json(work / "config.json") or {}) == wanted:
        with open(work / "lock", "w") as lock:
            if _locked(lock):
                shutil.rmtree(work)


def _locked(file: IO[str]) -> bool:
    """Takes the lock, which ends with the process if not before. False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def complete(work: Path, wanted: dict[str, Any], state: dict[str, Any]) -> None:
    """Gives the token files their index, counts the dictionary's symbols in train, and writes ``prepare.json``."""
    tokenizer = load_tokenizer(work)
    for split, tally in state["splits"].items():
        if (work / f"{split}.sizes.partial").exists():  # else it was finished before an interruption
            IndexedDatasetWriter(work / split, tokenizer.vocab_size, (tally["documents"], tally["tokens"])).finish()
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for block in IndexedDataset(work / "train").blocks():  # now, rather than in the state that every save would write
        counts += np.bincount(block, minlength=len(counts))
    tokenizer.dictionary.with_counts(counts.tolist()).save(work / "dict.txt")
    package = _PACKAGES[tokenizer.kind]
    files = [f"{split}.{end}" for split in state["splits"] for end in ("bin", "idx")] + ["dict.txt", *tokenizer.files]
    write_json(
        work / "prepare.json",
        {
            "version": 1,
            "config": wanted,
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "lossless": tokenizer.lossless,
                "sha256": tokenizer.sha256(),
            },
            "splits": state["splits"],
            "documents_read": state["counts"]["read"],
            "empty": state["counts"]["empty"],
            "duplicates": state["counts"]["duplicates"],
            "files": files,
            "versions": {"momentum_lm": __version__, package: importlib.metadata.version(package)},
        },
    )


def publish(work: Path, output: Path) -> dict[str, Any]:
    """Moves the finished files to their place, ``prepare.json`` last: where it is, all is there. May be cut short and repeated."""
    result = read_json(work / "prepare.json")
    assert result is not None
    (output / "prepare.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        if (work / name).exists():
            os.replace(work / name, output / name)
        elif name not in result["files"]:
            (output / name).unlink(missing_ok=True)
    os.replace(work / "prepare.json", output / "prepare.json")
    return result


def difference(before: Any, now: dict[str, Any]) -> str:
    """What keeps two recorded settings apart, in words that follow "prepared with"."""
    if not isinstance(before, dict):
        return "other settings"
    names = [name for name in now if before.get(name) != now[name] and name not in ("files", "source_bytes", "source_fingerprint")]
    if not names:
        return "a source whose content has changed since"
    return "other settings: " + ", ".join(f"{name} {json.dumps(before.get(name))} (now {json.dumps(now[name])})" for name in names)


def read_json(path: Path) -> dict[str, Any] | None:
    """None if there is no such file. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or use --force") from error

"""The folder where ``momentum-lm prepare`` works until all is done, and how its files get to their place.

``OUTPUT/.prepare`` holds ``config.json`` (the settings), ``plan.json`` and the tokenizer (splits and vocabulary are
settled), ``state.json`` (how far the ``.partial`` token files are good) and at last ``prepare.json`` (all is made, only
to be moved). A folder of that name without such a ``config.json`` is somebody else's and stays as it is; so do other
files in ours.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from momentum_lm import __version__
from momentum_lm.errors import UserError, arg
from momentum_lm.files import LockTaken, take_lock, write_json
from momentum_lm.text.indexed import IndexedDataset, IndexedDatasetWriter
from momentum_lm.text.selection import SPLITS
from momentum_lm.text.sources import Interrupted
from momentum_lm.text.tokenizer import load_tokenizer
from momentum_lm.untrusted import parse_json

TOKENIZER_FILES = ("sentencepiece.model", "encoder.json", "vocab.bpe", "tokenizer.json", "tokenizer_config.json")
OUTPUTS = (*(f"{split}.{end}" for split in SPLITS for end in ("bin", "idx")), "dict.txt", *TOKENIZER_FILES)
_PACKAGES = {"sentencepiece": "sentencepiece", "gpt2_bpe": "regex", "huggingface": "tokenizers"}


@contextlib.contextmanager
def reserved(output: Path) -> Iterator[Path]:
    """``output/.prepare``, made if need be and locked until the end, when it goes if nothing is in it; so does
    ``output`` if it is new.

    Raises UserError while another process is at work there, where ``output`` is no folder, and where what is there is
    not ours.
    """
    check_output(output)
    work, created = output / ".prepare", not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(work)
    try:
        yield work
    finally:
        empty = False
        try:
            empty = os.listdir(work) == ["lock"]
            if empty:
                (work / "lock").unlink()
        finally:
            os.close(lock)
        if empty:
            # not sooner: on a network file system an open file stays in its folder, under another name; nor for
            # certain,
            # for by now somebody else may have put something there
            with contextlib.suppress(OSError):
                work.rmdir()
                if created:
                    output.rmdir()


def check_output(output: Path) -> None:
    """Raises UserError unless ``output`` is a folder, or nothing yet, whose files of our names are ordinary ones."""
    if output.is_symlink() and not output.exists():
        raise UserError(arg(output=output), " is a link to nothing; remove it, or name a folder")
    if output.exists() and not output.is_dir():
        raise UserError(arg(output=output), f" is a {'file' if output.is_file() else 'device or pipe'}; name a folder")
    for path in (output / name for name in (*OUTPUTS, "prepare.json")):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            problem = "is a link, a folder or a device, which is not replaced"
            raise UserError(f"{path} {problem}; move it away, or use another ", arg("output"))


@contextlib.contextmanager
def workplace(work: Path, wanted: dict[str, Any], as_of: str, force: bool) -> Iterator[bool]:
    """The unfinished work of the same settings in ``work``, if any; it is removed when all is done, or worthless.

    ``as_of`` tells of the sources' times; gives True if they were others when the unfinished work began.
    Raises UserError for unfinished work of other settings unless ``force``.
    """
    before = read_json(work / "config.json")
    same = before is not None and same_settings(before, wanted)
    if before is not None and not same and not force and _has_results(work):
        other = difference(before, wanted)
        problem = f"{work.parent} holds unfinished work with {other}"
        raise UserError(f"{problem}; use another ", arg("output"), ", or ", arg(force=True), " to drop it")
    if not same:
        _clear(work)
        write_json(work / "config.json", wanted | {"sources_as_of": as_of})
    try:
        yield same and before is not None and before.get("sources_as_of") != as_of
    except BaseException as error:
        # Where the input has to change before this can go on, the work so far will not fit it
        input_is_wrong = isinstance(error, UserError) and not isinstance(error, Interrupted)
        if input_is_wrong or not _has_results(work):
            _clear(work)
        raise
    _clear(work)


def _has_results(work: Path) -> bool:
    return (work / "plan.json").exists()


def clear_away(output: Path, wanted: dict[str, Any]) -> None:
    """Removes the empty workplace of a run that was killed after its last file had been moved."""
    work = output / ".prepare"
    if work.is_symlink() or not work.is_dir():
        return
    if os.listdir(work) == ["lock"] or same_settings(read_json(work / "config.json"), wanted):
        with contextlib.suppress(UserError, OSError), reserved(output):
            _clear(work)


def _take_lock(work: Path) -> int:
    """The open file ``work/lock``, which this process alone has until it closes it or ends."""
    while True:
        work.mkdir(exist_ok=True)
        _refuse_what_is_not_ours(work)
        try:
            return take_lock(work / "lock")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except LockTaken:
            problem = f"another prepare is at work in {work.parent}"
            raise UserError(f"{problem}; wait for it, or use another ", arg("output")) from None


_MARK = "sources"  # a key of config.json, by which a folder called .prepare is known to be ours
_OURS = ("config.json", "plan.json", "state.json", "prepare.json", *OUTPUTS)
_PARTIAL = tuple(f"{split}.{end}.partial" for split in SPLITS for end in ("bin", "sizes", "idx"))


def _is_ours(name: str) -> bool:
    """Whether a file in ``.prepare`` has a name of ours, or that of an unfinished one."""
    names = (*_OURS, *_PARTIAL)
    return name in names or any(name.startswith(f".{own}.") for own in names)


def _refuse_what_is_not_ours(work: Path) -> None:
    if work.is_symlink() or not work.is_dir():
        raise UserError(f"{work} is a link or a file; move it away, or use another ", arg("output"))
    lock = work / "lock"
    if lock.is_symlink() or (lock.exists() and (not lock.is_file() or lock.stat().st_size)):
        raise UserError(f"{lock} is not a lock of this command; move it away, or use another ", arg("output"))
    strangers = sorted(name for name in os.listdir(work) if name != "lock" and not name.startswith(".config.json."))
    config = read_json(work / "config.json") if "config.json" in strangers else None
    if strangers and (config is None or _MARK not in config):
        problem = f"{work} holds {strangers[0]}, which this command did not make"
        raise UserError(f"{problem}; move it away, or use another ", arg("output"))


def _clear(work: Path) -> None:
    """Removes what is ours, and nothing else, but for the lock. It may be killed at any moment: what says that other
    files are good goes first, the mark last.
    """
    first, last = ("state.json", "plan.json"), "config.json"
    for name in sorted(os.listdir(work), key=lambda name: (name == last, name not in first)):
        if _is_ours(name):
            os.unlink(work / name)


def complete(work: Path, wanted: dict[str, Any], as_of: str, state: dict[str, Any]) -> None:
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
            "config": wanted | {"source_fingerprint": state["counts"]["chain"]},
            "sources_as_of": as_of,
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
            "nulls": state["counts"].get("nulls", 0),  # which a state of an earlier version does not have
            "quoted": state["counts"].get("quoted", 0),
            "special_tokens": state.get("special_tokens", 0),
            "files": files,
            "versions": {"momentum_lm": __version__, package: importlib.metadata.version(package)},
        },
    )


def publish(work: Path, output: Path) -> dict[str, Any]:
    """Moves the finished files to their place, ``prepare.json`` last: where it is, all is there. May be cut short and
    repeated.
    """
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


# In records of settings, but no settings
_ABOUT_SOURCES = ("files", "source_bytes", "source_fingerprint", "sources_as_of")


def same_settings(before: Any, now: dict[str, Any]) -> bool:
    """Whether a recorded configuration is of the settings ``now``, whatever the sources held."""
    return isinstance(before, dict) and all(before.get(name) == now[name] for name in now if name not in _ABOUT_SOURCES)


def same_documents(made: dict[str, Any], counts: dict[str, Any]) -> bool:
    """Whether data with this ``prepare.json`` was made of the documents that ``DocumentStream.counts`` tells of."""
    config = made.get("config", {})
    before = (config.get("source_fingerprint"), made.get("documents_read"), made.get("empty"), made.get("duplicates"))
    return before == (counts["chain"], counts["read"], counts["empty"], counts["duplicates"])


def difference(before: Any, now: dict[str, Any]) -> str:
    """What keeps two recorded settings apart, in words that follow "prepared with"."""
    if not isinstance(before, dict):
        return "other settings"
    names = [name for name in now if before.get(name) != now[name] and name not in _ABOUT_SOURCES]
    if not names:
        return "a source whose content has changed since"
    return "other settings: " + ", ".join(
        f"{name} {json.dumps(before.get(name))} (now {json.dumps(now[name])})" for name in names
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """None if there is no such file. Raises UserError if it is no JSON object."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; move it away, or use another ", arg("output"))
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or use ", arg(force=True)) from error
    if not isinstance(value, dict):
        problem = f"{path} is not a file of this command: it holds no JSON object"
        raise UserError(f"{problem}; move it away, or use another ", arg("output"))
    return value

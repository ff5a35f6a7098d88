"""Labelled data sets for in-context learning: from the Hugging Face hub, a folder of local files, or files that a YAML
file names.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momentum_lm.errors import Argument, UserError, arg
from momentum_lm.icl.datasets.definitions import SPLITS, available, check_names, load_spec
from momentum_lm.icl.datasets.spec import DatasetSpec, Example, Hub
from momentum_lm.text.hub import hub_answers
from momentum_lm.text.tables import SUFFIXES, read_rows
from momentum_lm.untrusted import printable

__all__ = ["DatasetSpec", "Example", "LabelledDataset", "available", "by_name", "load_dataset", "load_spec"]

PACKAGED = ("mr", "trec", "bbc", "imdb")  # what scripts/fetch_datasets.py makes of packages
_CONVERTED = "refs/convert/parquet"  # where the hub keeps parquet files that it made of other formats
Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class LabelledDataset:
    """The splits that were asked for, in the order of their files; the other is empty.

    ``source`` is for records: ``kind`` ("hub" or "local"), ``id``, ``subset`` and ``revision`` or the files' ``path``,
    ``splits`` (their names there) and ``sha256`` of each split's rendered examples. ``notes``: what is to be told of
    rows, such as how many are left out.
    """

    spec: DatasetSpec
    train: list[Example]
    evaluation: list[Example]
    source: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def by_name(datasets: Sequence[LabelledDataset]) -> dict[str, LabelledDataset]:
    """The data sets by their names. Raises UserError where two have the same."""
    check_names([data.spec for data in datasets])
    return {data.spec.name: data for data in datasets}


def load_dataset(
    name_or_yaml: str,
    data_dir: str | os.PathLike[str] | None = None,
    template: str = "code",
    shorten: Callable[[str], str] | None = None,
    splits: Sequence[str] = SPLITS,
) -> LabelledDataset:
    """Loads and renders ``splits`` ("train", "evaluation") of a built-in data set or of a YAML file's.

    Files come first: ``data_dir/NAME/train.jsonl`` (or .csv, .tsv, .parquet) and the like, the evaluated one named as
    the hub's split, validation or test; then the files that the YAML names; then the hub. ``template``:
    :func:`load_spec`. ``shorten`` is applied to the text of each field. Raises UserError for what cannot be found,
    loaded or rendered, and for a split without examples.
    """
    spec = load_spec(name_or_yaml, template)
    folder = Path(data_dir).expanduser() / spec.name if data_dir is not None else None
    if folder and not folder.parent.is_dir():
        raise UserError(arg(data_dir=data_dir), ": no such folder; check the path")
    if folder and folder.is_symlink() and not folder.exists():
        raise UserError(
            arg("data_dir"),
            f": {folder} is a link to {printable(os.readlink(folder))}, where there is nothing; fix the link",
        )
    if folder and folder.is_dir():
        source: dict[str, Any] = {"kind": "local", "path": printable(folder)}
        paths = {split: _find(folder, split, spec) for split in splits}
    elif spec.files:
        source = {"kind": "local", "path": printable(spec.path.parent)}
        paths = {split: spec.path.parent / _file_of(spec, split) for split in splits}
    elif spec.hub:
        source, paths = {"kind": "hub", "id": spec.hub.id, "subset": spec.hub.subset, "revision": spec.hub.revision}, {}
    else:
        raise UserError(f"{spec.path} names neither `files` nor a `hub`; name them, or ", _provide(spec, data_dir))

    source |= {"splits": {}, "sha256": {}}
    loaded: dict[str, list[Example]] = {}
    notes: list[str] = []
    for split in splits:
        if spec.hub and split not in paths:
            what = f"{spec.hub.id}, {spec.splits[split]}"
            rows = _hub_rows(spec, spec.hub, spec.splits[split], _provide(spec, data_dir))
        else:
            what, rows = str(paths[split]), read_rows(paths[split], spec.needed)
        loaded[split], source["sha256"][split] = _render(spec, rows, what, shorten, notes)
        source["splits"][split] = printable(paths[split].name) if paths else spec.splits[split]
    return LabelledDataset(
        spec, loaded.get("train", []), loaded.get("evaluation", []), source, list(dict.fromkeys(notes))
    )


def _render(
    spec: DatasetSpec, rows: Rows, what: str, shorten: Callable[[str], str] | None, notes: list[str]
) -> tuple[list[Example], str]:
    """The examples of a split, and their digest. ``notes`` gets what is left out, and empty."""
    examples: list[Example] = []
    digest, count = hashlib.sha256(), 0
    for count, (where, row) in enumerate(rows, start=1):
        example = spec.render(row, count - 1, where, shorten)
        if example is not None:
            examples.append(example)
            digest.update(ascii((example.inputs, example.continuations, example.gold)).encode())
    if not examples:
        rest = f"none of its {count} rows has {spec.num_choices} choices" if count else "it has no rows"
        raise UserError(f"{what}: no examples, for {rest}; use another file")
    if left_out := count - len(examples):
        notes.append(f"{what}: {left_out:,} of {count:,} rows left out, which have not {spec.num_choices} choices")
    most = len(spec.choices) if isinstance(spec.choices, tuple) else 0
    fewer = sum(len(example.continuations) < most for example in examples)
    if fewer:
        notes.append(
            f"{what}: {fewer:,} of {count:,} rows have empty cells among {', '.join(spec.choices or ())}, which "
            "are no choices"
        )
    empty = sum(example.inputs[0] == spec.empty_input for example in examples)
    if empty:
        notes.append(f"{what}: {empty:,} of {count:,} rows have no text")
    return examples, digest.hexdigest()


def _find(folder: Path, split: str, spec: DatasetSpec) -> Path:
    stems = ["train"] if split == "train" else list(dict.fromkeys([spec.splits[split], "validation", "test"]))
    for stem in stems:
        for suffix in SUFFIXES:
            path = folder / f"{stem}{suffix}"
            if path.exists() or path.is_symlink():  # what is wrong with a link is said where it is read
                return path
    raise UserError(f"{folder} has no file for {split}; ", _provide(spec, folder.parent))


def _file_of(spec: DatasetSpec, split: str) -> str:
    if split not in spec.files:
        raise UserError(f"{spec.path}: `files` names none for {split}; add it")
    return spec.files[split]


def _provide(spec: DatasetSpec, data_dir: str | os.PathLike[str] | None) -> UserError:
    """The remedy for files that are not there: which ones, with which columns."""
    home = f"{'DIR' if data_dir is None else data_dir}/{spec.name}"
    script = (
        f"; `python scripts/fetch_datasets.py {spec.name} --output DIR` makes such files"
        if spec.name in PACKAGED
        else ""
    )
    names = f"{home}/train.jsonl and {home}/{spec.splits['evaluation']}.jsonl"
    where: list[str | Argument] = [" and give ", arg(data_dir="DIR")] if data_dir is None else []
    return UserError(f"provide {names} (or .csv, .tsv, .parquet; columns: {', '.join(spec.columns)})", *where, script)


def _hub_rows(spec: DatasetSpec, hub: Hub, split: str, remedy: UserError) -> Rows:
    try:
        with _quick_offline(hub):
            data = _load_split(hub, split)
    except Exception as error:  # whatever datasets, huggingface_hub and the network library under them raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        problem = f"{spec.name} could not be loaded from the hub ({hub.id}: {reason}); without network or permission, "
        raise UserError(problem, remedy) from error
    needed = spec.needed(data.column_names)
    if set(needed) <= set(data.column_names):  # where one is missing, render says so, and which there are
        data = data.select_columns(sorted(needed))
    for number, row in enumerate(data):
        yield f"{hub.id}, {split} row {number}", row


def _load_split(hub: Hub, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub.id, hub.subset, split=split, revision=hub.revision)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or hub.revision:
            raise
        return datasets.load_dataset(hub.id, hub.subset, split=split, revision=_CONVERTED)


@contextlib.contextmanager
def _quick_offline(hub: Hub) -> Iterator[None]:
    """Without a network the libraries, told so, look in their cache at once."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not os.path.isdir(hub.id) and not hub_answers():
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value

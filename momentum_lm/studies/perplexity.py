"""Perplexity of a model on binarised text at several context lengths: the protocol of the paper's Table 6.

The documents of a split make one stream of tokens, cut into blocks of L tokens that do not overlap; each block is
scored without what came before it, except that its first input is the token before the block, or the end-of-sentence
token at a document's beginning. So every token is scored once, the same tokens at every L, and the numbers equal those
of ``fairseq-eval-lm --sample-break-mode none --tokens-per-sample L``.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from momentum_lm.analysis.by_position import LossByPosition
from momentum_lm.analysis.statistics import Interval, bootstrap_mean_ci
from momentum_lm.errors import UserError, arg
from momentum_lm.files import Unchanged, atomic_write, file_sha256, file_stem
from momentum_lm.lm.protocol import PerplexityModel
from momentum_lm.lm.scoring import broken_weights
from momentum_lm.results import identity
from momentum_lm.results.ownership import ARRAYS, check_ours, check_pictures
from momentum_lm.results.records import Results, results_lock, say_finished
from momentum_lm.results.schema import RECORDS
from momentum_lm.system import progress_bar
from momentum_lm.text.dictionary import EOS, PAD, Dictionary, check_symbols
from momentum_lm.text.indexed import IndexedDataset
from momentum_lm.untrusted import parse_json

TASK = "lm_perplexity"
_RESAMPLES = 2000
_WORST = 700.0  # nats for one token: beyond, its perplexity is no longer a number
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One split of a binarised data folder. ``bytes``: UTF-8 bytes of its text, where ``prepare.json`` tells."""

    name: str
    dataset: IndexedDataset
    sha256: str
    bytes: int | None
    dictionary_sha256: str
    files: Unchanged


def load_split(data: str | os.PathLike[str], name: str, lm: PerplexityModel) -> Split:
    """Opens ``DATA/<name>.bin``. Raises UserError if it is missing or empty, or its dictionary is not the model's."""
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that `momentum-lm prepare` or `fairseq-preprocess` made")
    prefix = folder / name
    if not Path(f"{prefix}.idx").exists():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.idx"))) or "none"
        raise UserError(f"{folder} has no split {name!r} (there: {there}); choose one with ", arg("splits"))
    dictionary = Dictionary.load(folder / "dict.txt")
    if len(dictionary) != lm.vocab_size:
        raise UserError(
            f"{folder / 'dict.txt'} has {len(dictionary)} entries, but {lm.name} was trained with {lm.vocab_size}: "
            "evaluate on data made with the model's own dictionary"
        )
    check_symbols(dictionary.symbols, getattr(lm, "dictionary", None), str(folder / "dict.txt"))
    _check_dictionary(lm, dictionary, folder / "dict.txt")
    files = Unchanged([f"{prefix}.idx", f"{prefix}.bin"])
    dataset = IndexedDataset(prefix)
    if dataset.num_tokens == 0:
        raise UserError(f"{prefix}.bin is empty: there is nothing to score")
    sha256 = file_sha256(f"{prefix}.idx", f"{prefix}.bin")
    symbols = identity.digest(dictionary.symbols)
    return Split(name, dataset, sha256, _text_bytes(folder, name, dataset.num_tokens), symbols, files)


def _check_dictionary(lm: PerplexityModel, dictionary: Dictionary, path: Path) -> None:
    """Raises UserError where the data's dictionary has other symbols than the model's: beside the checkpoint, or else
    that of the data that the checkpoint says it was trained on, where it still is."""
    if getattr(lm, "dictionary", None) is not None:
        return  # the checkpoint has its own symbols, compared above
    named = getattr(lm, "trained_on", None)
    places = [Path(lm.name).parent / "dict.txt", *([Path(named) / "dict.txt"] if named else [])]
    own = next((place for place in places if place.is_file()), None)
    if own is not None and Dictionary.load(own).symbols != dictionary.symbols:
        what = "model's dictionary" if own == places[0] else "dictionary of the data that the model was trained on,"
        raise UserError(f"{path} is not the {what} {own}; evaluate on data made with the model's own dictionary")


def batches(
    dataset: IndexedDataset, context_length: int, rows: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Inputs, targets and document numbers, each (B, T), of up to ``rows`` successive blocks; the last block is padded
    on the right.

    Documents of padding are -1.
    """
    ends = np.cumsum(dataset.sizes, dtype=np.int64)
    starts = ends - dataset.sizes
    total = int(ends[-1])
    for first in range(0, total, context_length * rows):
        last = min(first + context_length * rows, total)
        documents = np.arange(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last - 1, "right") + 1)
        offset = first - int(starts[documents[0]])
        tokens = np.concatenate([dataset[int(d)] for d in documents]).astype(np.int64)
        owners = np.repeat(documents, dataset.sizes[documents])
        targets, owners = tokens[offset : offset + last - first], owners[offset : offset + last - first]
        inputs = np.concatenate([[tokens[offset - 1] if offset else EOS], targets[:-1]])
        blocks = np.arange(first, last, context_length)
        begins = (
            starts[np.searchsorted(starts, blocks, "right") - 1] == blocks
        )  # documents that begin where a block does
        inputs[blocks[begins] - first] = EOS
        count = len(blocks)
        pad = (0, count * context_length - len(targets))
        yield tuple(  # type: ignore[misc]
            np.pad(x, pad, constant_values=fill).reshape(count, context_length)
            for x, fill in ((inputs, PAD), (targets, PAD), (owners, -1))
        )


def score_documents(
    lm: PerplexityModel,
    dataset: IndexedDataset,
    context_length: int,
    batch_tokens: int = 16384,
    packed_documents: bool = False,
    progress: Any = None,
    by_position: LossByPosition | None = None,
) -> NDArray[np.float64]:
    """Summed negative log-likelihood of each document, in nats, (documents,).

    ``batch_tokens``: about how many tokens go through the model at once (at least one block). ``packed_documents``: no
    document sees another. ``by_position``: gets all losses. Raises UserError for a context longer than the model's, ids
    outside its vocabulary, padding in the data, or NaN.
    """
    check_context_length(lm, context_length)
    totals = np.zeros(len(dataset))
    scored = 0
    for inputs, targets, documents in batches(dataset, context_length, max(1, batch_tokens // context_length)):
        real = documents >= 0
        low, high = int(targets[real].min()), int(targets[real].max())
        if high >= lm.vocab_size or low < 0 or (targets[real] == PAD).any():
            what = (
                "padding" if high < lm.vocab_size else f"token {high}, beyond the model's vocabulary of {lm.vocab_size}"
            )
            raise UserError(f"{dataset.prefix}.bin holds {what}; make the data anew with the model's dictionary")
        losses = lm.token_losses(torch.from_numpy(inputs), torch.from_numpy(targets), packed_documents).double().numpy()
        if not losses.max() < _WORST:  # NaN too
            raise broken_weights(lm, f" at context length {context_length}")
        begun = documents[real].min()  # successive documents: only their totals are touched, however many there are
        sums = np.bincount(documents[real] - begun, weights=losses[real])
        totals[begun : begun + len(sums)] += sums
        scored += int(real.sum())
        if by_position is not None:
            by_position.add(losses, real)
        if progress is not None:
            progress.update(int(real.sum()))
    if scored == 0 or scored != dataset.num_tokens:
        raise UserError(
            f"{dataset.prefix}.bin: {scored} of {dataset.num_tokens} tokens were scored; the file changed meanwhile, "
            "or is empty"
        )
    return totals


def check_context_length(lm: PerplexityModel, context_length: int) -> None:
    """Raises UserError unless the model can be given that many tokens."""
    if not 1 <= context_length <= lm.max_positions:
        raise UserError(arg(context_lengths=context_length), f": {lm.name} takes from 1 to {lm.max_positions} tokens")


def evaluate(
    lm: PerplexityModel,
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    context_lengths: Sequence[int],
    splits: Sequence[str] = ("valid",),
    batch_tokens: int = 16384,
    packed_documents: bool = False,
    seed: int = 0,
    force: bool = False,
    show_progress: bool = True,
) -> Results:
    """Scores every split at every context length, each finished one recorded at once in ``folder``; finished ones are
    not run again.

    Writes ``results.json`` and ``documents/<split>-<length>.npz`` (``nll`` in nats and ``tokens`` per document).
    ``seed`` is that of the bootstrap over documents behind each ``ci95``. Raises UserError as the functions above and
    ``Results`` do, and where the model's or the data's files change meanwhile.
    """
    with results_lock(folder):
        for length in context_lengths:
            check_context_length(lm, length)
        opened = [load_split(data, name, lm) for name in dict.fromkeys(splits)]
        config = {
            "data": {"path": str(data), "dictionary_sha256": opened[0].dictionary_sha256},
            "dtype": identity.dtype(lm),
            "device": lm.device.type,
            "revision": identity.REVISION,
            "versions": identity.versions(),
            "packed_documents": packed_documents,
            "bootstrap": {"seed": seed, "resamples": _RESAMPLES},
        }
        results = Results(folder, TASK, lm.describe(), config, RECORDS[TASK].key, force)
        if not force:
            check_pictures(results.folder, splits)
        todo = list(_todo(results, opened, context_lengths, force))
        if not todo and show_progress:
            say_finished(folder)
        total = sum(split.dataset.num_tokens for split, _ in todo)
        with progress_bar(total=total, unit="tok", unit_scale=True, disable=not (todo and show_progress)) as bar:
            for split, length in todo:
                bar.set_description(f"{split.name}, context {length}")
                start = time.perf_counter()
                places = LossByPosition(length)
                nll = score_documents(lm, split.dataset, length, batch_tokens, packed_documents, bar, places)
                lm.check_unchanged()
                split.files.check()
                seconds = round(time.perf_counter() - start, 3)
                run = _record(split, length, nll, seed) | _by_position(places)
                run |= {"device": str(lm.device), "seconds": seconds}
                target = results.folder / run["documents"]
                target.parent.mkdir(parents=True, exist_ok=True)
                tokens = np.asarray(split.dataset.sizes, dtype=np.int64)
                with atomic_write(target, "wb") as file:  # the fingerprint first: it is the mark that the file is ours
                    np.savez_compressed(file, fingerprint=np.array(split.sha256), nll=nll, tokens=tokens)
                results.add(run)
        return results


def _todo(
    results: Results, splits: Sequence[Split], lengths: Sequence[int], force: bool
) -> Iterator[tuple[Split, int]]:
    """What ``results`` lack. Raises UserError for results of other data, and files in the way that are not ours."""
    for split in splits:
        for length in dict.fromkeys(lengths):
            old = results.find(split=split.name, context_length=length)
            if old is not None and old["data_sha256"] != split.sha256:
                raise UserError(
                    f"{results.folder / 'results.json'} was measured on another {split.dataset.prefix}.bin; choose "
                    "another ",
                    arg("folder"),
                    ", or add ",
                    arg(force=True),
                    " to replace it",
                )
            if old is None or not (results.folder / old["documents"]).exists():
                if not force:
                    check_ours(results.folder / _documents(split, length), ARRAYS)
                yield split, length


def _record(split: Split, context_length: int, nll: NDArray[np.float64], seed: int) -> dict[str, Any]:
    sizes = np.asarray(split.dataset.sizes, dtype=np.float64)
    kept = sizes > 0
    total, tokens = float(nll.sum()), split.dataset.num_tokens
    ci95 = None
    if kept.sum() >= 2:
        interval = bootstrap_mean_ci(nll[kept], _RESAMPLES, seed, weights=sizes[kept])
        ci95 = [math.exp(interval.low), math.exp(interval.high)]
    return {
        "split": split.name,
        "context_length": context_length,
        "perplexity": math.exp(total / tokens),
        "ci95": ci95,
        "bits_per_byte": None if not split.bytes else total / math.log(2) / split.bytes,
        "num_tokens": tokens,
        "num_documents": int(kept.sum()),
        "nll": total,
        "data_sha256": split.sha256,
        "documents": _documents(split, context_length),
    }


def _by_position(places: LossByPosition) -> dict[str, Any]:
    """What a record says of the losses by their place in a block, in nats a token."""

    def estimate(name: str, value: Interval) -> dict[str, Any]:
        ci95 = None if value.size < 2 else [value.low, value.high]
        return {name: value.estimate, "ci95": ci95, "blocks": value.size}

    score = places.icl_score()
    return {
        "by_position": [{"end": end} | estimate("loss", value) for end, value in places.losses()],
        "icl_score": None if score is None else estimate("score", score),
    }


def _documents(split: Split, context_length: int) -> str:
    return f"documents/{file_stem(split.name)}-{context_length}.npz"


def _text_bytes(folder: Path, split: str, tokens: int) -> int | None:
    """Bytes of the split's text by ``prepare.json``; None without one, or where it speaks of other data or not of this
    split."""
    path = folder / "prepare.json"
    if not path.exists():
        return None
    try:
        splits = parse_json(path.read_bytes())["splits"]
        if split not in splits:  # made beside it by other means
            return None
        entry = splits[split]
        counted, size = int(entry["tokens"]), int(entry["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}); run `momentum-lm prepare` again, or delete it to do without bits per byte"
        ) from error
    if counted != tokens:
        _log.warning("%s says %d tokens for %s, but there are %d: no bits per byte", path, counted, split, tokens)
        return None
    return size

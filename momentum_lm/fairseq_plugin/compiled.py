"""NumPy forms of the extensions that fairseq compiles: block indices, batch indices, BLEU counts.

fairseq_compat puts them in the place of ``token_block_utils_fast``, ``data_utils_fast`` and ``libbleu`` where fairseq
was installed without a compiler. They return what the compiled forms return (fairseq 0.12.2), which the tests hold them
to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


# fairseq.data.token_block_utils_fast


def slice_indices(sizes: Indices, break_mode: str | None, block_size: int, document_sep_len: int) -> Indices:
    """The blocks of a corpus, (blocks, 2): where each begins and ends, in tokens.

    ``sizes`` are the sentences' lengths. ``break_mode``: "none" cuts every ``block_size`` tokens; "eos" makes each
    sentence a block; "complete" joins whole sentences up to ``block_size``; "complete_doc" the same within documents,
    which sentences of ``document_sep_len`` tokens separate, and drops blocks of less than two tokens. Raises ValueError
    for another ``break_mode``.
    """
    ends = np.cumsum(sizes)
    starts = ends - sizes
    if break_mode is None or break_mode == "none":
        total = int(ends[-1]) if len(ends) else 0
        first = np.arange(0, total, block_size, dtype=np.int64)
        return np.stack([first, np.minimum(first + block_size, total)], axis=1)
    if break_mode == "eos":
        return np.stack([starts, ends], axis=1)
    if break_mode not in ("complete", "complete_doc"):
        raise ValueError(f"Invalid break_mode: {break_mode}")

    # The sentence after the block that begins with each sentence: as many as fit, or one with tokens where that is too
    # long.
    following = np.maximum(
        np.searchsorted(ends, starts + block_size, side="right"), np.searchsorted(ends, starts, side="right") + 1
    ).clip(max=len(sizes))
    shortest = 1
    if break_mode == "complete_doc":
        shortest = 2
        separators = np.flatnonzero(sizes == document_sep_len)
        next_separator = np.append(separators, len(sizes))[np.searchsorted(separators, np.arange(len(sizes)))]
        following = np.minimum(following, next_separator)
        following[separators] = separators + 1
        starts[separators] = ends[separators]  # a block of no tokens, which is dropped below
    firsts = np.fromiter(_chain(following.tolist()), dtype=np.int64)
    blocks = (
        np.stack([starts[firsts], ends[following[firsts] - 1]], axis=1) if len(firsts) else np.zeros((0, 2), np.int64)
    )
    return blocks[blocks[:, 1] - blocks[:, 0] >= shortest]


def _chain(following: list[int]) -> Iterator[int]:
    """0, following[0], following[following[0]], ... until the end of the list."""
    at = 0
    while at < len(following):
        yield at
        at = following[at]


def block_to_dataset_index(sizes: Indices, blocks: Indices) -> Indices:
    """The sentences of each block, (blocks, 3): the first one, the offset in it, the last one. ``blocks`` as from
    `slice_indices`.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def seek(positions: Indices) -> tuple[Indices, Indices]:
        """The sentence of each token and the offset in it: of several that begin there, all but one of them empty, the
        first.
        """
        at = np.searchsorted(starts, positions)
        at = np.where(starts[at.clip(max=len(sizes))] == positions, at, at - 1)
        return at, positions - starts[at]

    first, offset = seek(blocks[:, 0])
    empty = blocks[:, 1] <= blocks[:, 0]
    last, _ = seek(np.where(empty, blocks[:, 0], blocks[:, 1] - 1))
    return np.stack([first, offset, np.where(empty, first, last)], axis=1).astype(np.int64)


# fairseq.data.data_utils_fast


def batch_by_size_vec(
    indices: Indices, num_tokens: Indices, max_tokens: int, max_sentences: int, bsz_mult: int
) -> list[Indices]:
    """``indices`` in order, cut into batches of at most ``max_sentences`` sentences, whose number times the longest
    one's ``num_tokens`` is at most ``max_tokens`` (no limit: 0 or less). Batches of ``bsz_mult`` sentences or more have
    a multiple of it.
    """
    if len(indices) == 0:
        return []
    longest, count = int(np.max(num_tokens)), len(indices)
    assert max_tokens <= 0 or longest <= max_tokens, f"Sentences lengths should not exceed max_tokens={max_tokens}"
    sizes = num_tokens[:count]
    most = max_sentences if max_sentences > 0 else count
    if max_tokens > 0 and longest > 0:
        fitting = min(max_tokens // longest, count)  # as many fit, whichever they are
        # and one more never fits
        if fitting == count or int(np.partition(sizes, fitting)[fitting]) * (fitting + 1) > max_tokens:
            most, max_tokens = min(most, fitting), 0
    if max_tokens <= 0 or longest * most <= max_tokens:  # only their number counts, as with blocks of one length
        step = _multiple(most, bsz_mult)
        last = max(0, -(-(count - most) // step)) * step  # where the last `most` or fewer begin
        end = last + _multiple(count - last, bsz_mult)
        return np.split(indices, [*range(step, last + 1, step), *([end] if end < count else [])])
    return np.split(indices, _batch_ends(sizes.tolist(), max_tokens, most, bsz_mult))


def _multiple(count: int, bsz_mult: int) -> int:
    """The most of ``count`` sentences that make a batch."""
    return count if count < bsz_mult else count - count % bsz_mult


def _batch_ends(sizes: list[int], max_tokens: int, most: int, bsz_mult: int) -> list[int]:
    """Where batches end, but for the last one."""
    ends = []
    # the batch so far; the sentences from its end on are left over until they make its size a multiple again
    start = end = 0
    longest = left_over = 0  # tokens of the longest sentence in the batch, and in what is left over
    for position, size in enumerate(sizes):
        left_over = max(left_over, size)
        count = position + 1 - start
        widest = max(longest, left_over)
        if count > most or count * widest > max_tokens:
            ends.append(end)
            if left_over * (position + 1 - end) > max_tokens:  # what is left over is a batch of its own
                ends.append(position)
                left_over = size
            start, end, longest, left_over = ends[-1], position + 1, left_over, 0
        elif count < bsz_mult or count % bsz_mult == 0:
            end, longest, left_over = position + 1, widest, 0
    if end != len(sizes):
        ends.append(end)
    return ends


def batch_by_size_fn(
    indices: Indices, num_tokens_fn: Callable[[int], int], max_tokens: int, max_sentences: int, bsz_mult: int
) -> list[Indices]:
    """`batch_by_size_vec` with a function that tells the tokens of each index."""
    num_tokens = np.fromiter((num_tokens_fn(index) for index in indices), dtype=np.int64, count=len(indices))
    return batch_by_size_vec(indices, num_tokens, max_tokens, max_sentences, bsz_mult)


def batch_fixed_shapes(
    indices: Indices, num_tokens_fn: Callable[[int], int], fixed_shapes_sorted: npt.NDArray[np.int64]
) -> list[list[int]]:
    """``indices`` in order, cut into batches that fit one of ``fixed_shapes_sorted``, (shapes, 2):
    sentences, tokens.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = 0
    shapes = fixed_shapes_sorted
    for index in indices.tolist():
        longest = max(longest, num_tokens_fn(index))
        fitting = np.flatnonzero((len(batch) + 1 <= shapes[:, 0]) & (longest <= shapes[:, 1]))
        if len(fitting):
            shapes = shapes[fitting[0] :]
        else:
            batches.append(batch)
            batch, longest, shapes = [], 0, fixed_shapes_sorted
        batch.append(index)
    return [*batches, batch] if batch else batches


# fairseq.libbleu


def add_bleu_counts(stat: Any, reference: Sequence[int], prediction: Sequence[int], pad: int, eos: int) -> None:
    """Adds a pair of sentences to ``stat``: ``reflen``, ``predlen``, and ``matchN`` of ``countN`` n-grams for N from 1
    to 4.
    """
    reference, prediction = (_trimmed(list(sentence), pad, eos) for sentence in (reference, prediction))
    stat.reflen += len(reference)
    stat.predlen += len(prediction)
    for n in range(1, 5):
        ours, theirs = (Counter(zip(*(s[i:] for i in range(n)), strict=False)) for s in (prediction, reference))
        setattr(stat, f"count{n}", getattr(stat, f"count{n}") + ours.total())
        setattr(stat, f"match{n}", getattr(stat, f"match{n}") + (ours & theirs).total())


def _trimmed(sentence: list[int], pad: int, eos: int) -> list[int]:
    """Without padding before it, and without padding and end-of-sentence after it; its first token stays
    in any case.
    """
    first = next((i for i, token in enumerate(sentence) if token != pad), len(sentence))
    last = next((i for i in range(len(sentence) - 1, first, -1) if sentence[i] not in (pad, eos)), first)
    return sentence[first : last + 1]

"""Log-probabilities of continuations, the demonstrations encoded once for all queries.

What all prompts share goes through the model once and stays in its cache; each query then costs only its own tokens, in batches of
similar length. Choices that share their beginning share a row of the batch: labels of one token each cost one row a query.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from momentum_lm.errors import UserError
from momentum_lm.lm.protocol import LanguageModel

from .prompts import Prompts, Request

T = TypeVar("T")
CPU_MEMORY = 256 << 20  # bytes that a batch may take beside the model and the cache
CPU_TOKENS = 512  # more at once are not faster on a CPU
GPU_SHARE = 0.4  # of the memory that is free when scoring begins


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of all choices: ``sums`` (n, C) in nats and ``counts`` (n, C) of their tokens.

    Where examples have unequal numbers of choices, rows end in NaN and 0.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    def values(self, kind: str) -> NDArray[np.float64]:
        """(n, C) scores: ``sum``, or ``mean`` over each continuation's tokens, as the paper has it."""
        with np.errstate(invalid="ignore"):
            return self.sums if kind == "sum" else self.sums / self.counts


@dataclass(frozen=True)
class _Row:
    """Tokens that go through the model, and what is read off: (choice, position, target)."""

    tokens: Sequence[int]
    wanted: list[tuple[int, int, int]]


def token_budget(lm: LanguageModel, prompts: Prompts) -> int:
    """How many tokens a batch may hold: on a GPU a share of the free memory, on a CPU a fixed amount."""
    longest = max(_lengths(prompts))
    row = lm.row_bytes(len(prompts.prefix), longest)
    if lm.device.type == "cuda":
        return max(1, int(GPU_SHARE * torch.cuda.mem_get_info(lm.device)[0]) // row) * longest
    return min(CPU_TOKENS, max(1, CPU_MEMORY // row) * longest)


def plan(prompts: Prompts, batch_tokens: int) -> list[list[int]]:
    """Batches of queries, longest first, each of at most ``batch_tokens`` tokens with padding (at least one query).

    The same prompts and budget give the same batches.
    """
    lengths = _lengths(prompts)
    batches: list[list[int]] = []
    rows = longest = 0
    for query in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        count = len(_rows(prompts.queries[query]))
        if not batches or (rows + count) * longest > batch_tokens:
            batches.append([])
            rows, longest = 0, lengths[query]
        batches[-1].append(query)
        rows += count
    return batches


def score(
    lm: LanguageModel,
    prompts: Prompts,
    batches: Sequence[Sequence[int]],
    padding_side: str = "right",
    finished: Callable[[int, Mapping[int, list[float]]], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[int, list[float]]:
    """{query: summed log-probability of each choice} for the batches with these ``numbers``, or all of them.

    ``finished`` is told each batch's number and results. Raises UserError where the model gives NaN or a probability of zero.
    """
    prefix = None
    results: dict[int, list[float]] = {}
    for number in range(len(batches)) if numbers is None else numbers:
        if prefix is None and prompts.prefix:
            prefix = lm.encode_prefix(prompts.prefix)
        found = dict(_score_batch(lm, prompts, batches[number], prefix, padding_side))
        results |= found
        if finished is not None:
            finished(number, found)
    return results


def collect(prompts: Prompts, sums: Mapping[int, list[float]]) -> Scores:
    """The scores of all queries as arrays."""
    choices = max(len(query) for query in prompts.queries)
    table = np.full((len(prompts.queries), choices), np.nan)
    counts = np.zeros((len(prompts.queries), choices), dtype=np.int64)
    for i, query in enumerate(prompts.queries):
        table[i, : len(query)] = sums[i]
        counts[i, : len(query)] = [len(request.tokens) - request.start for request in query]
    return Scores(table, counts)


def halving(run: Callable[[Sequence[int]], T], batch: Sequence[int]) -> list[T]:
    """``run``'s results of the batch, or of its halves, and theirs, where a GPU's memory does not hold it."""
    try:
        return [run(batch)]
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # outside the handler, which keeps what was allocated alive
    middle = len(batch) // 2
    return halving(run, batch[:middle]) + halving(run, batch[middle:])


def _score_batch(lm: LanguageModel, prompts: Prompts, batch: Sequence[int], prefix: object, side: str) -> Iterator[tuple[int, list[float]]]:
    parts = halving(lambda some: _run(lm, [_rows(prompts.queries[query]) for query in some], prefix, side), batch)
    for query, sums in zip(batch, itertools.chain(*parts), strict=True):
        if not np.isfinite(sums).all():
            raise UserError(f"{lm.name} gives probabilities of 0 or NaN: its weights are broken, or too large for {lm.dtype}")
        yield query, sums


def _run(lm: LanguageModel, queries: list[list[_Row]], prefix: object, side: str) -> list[list[float]]:
    rows = [row for query in queries for row in query]
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    padding = np.ones((len(rows), longest), dtype=bool)
    wanted = []  # (row, column, target)
    for i, row in enumerate(rows):
        shift = longest - len(row.tokens) if side == "left" else 0
        span = slice(shift, shift + len(row.tokens))
        tokens[i, span], padding[i, span] = row.tokens, False
        wanted += [(i, shift + position, token) for _, position, token in row.wanted]
    place, column, target = torch.tensor(wanted).unbind(1)
    values = iter(lm.log_probs(torch.from_numpy(tokens), torch.from_numpy(padding), place, column, target, prefix).double().tolist())
    results = []
    for query in queries:
        sums = [0.0] * (1 + max(choice for row in query for choice, _, _ in row.wanted))
        for row in query:
            for choice, _, _ in row.wanted:
                sums[choice] += next(values)
        results.append(sums)
    return results


def _rows(query: Sequence[Request]) -> list[_Row]:
    """The fewest rows from which all continuations of a query can be read: one that begins another needs none of its own."""
    rows: list[_Row] = []
    for choice in sorted(range(len(query)), key=lambda c: (-len(query[c].tokens), c)):
        request = query[choice]
        given = request.tokens[:-1]  # nothing is asked of the last token
        row = next((row for row in rows if row.tokens[: len(given)] == given), None)
        if row is None:
            row = _Row(given, [])
            rows.append(row)
        row.wanted.extend((choice, j - 1, request.tokens[j]) for j in range(request.start, len(request.tokens)))
    return rows


def _lengths(prompts: Prompts) -> list[int]:
    """Tokens of each query's longest row."""
    return [max(len(request.tokens) - 1 for request in query) for query in prompts.queries]

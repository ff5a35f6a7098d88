"""Log-probabilities of continuations after many different contexts, and whether the model would have written them itself.

:mod:`momentum_lm.icl.scoring` scores choices after one prompt's beginning. A harness asks for all that its tasks need at once: requests
with beginnings in common are found here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.icl.prompts import Prompts, Request, common_length
from momentum_lm.icl.scoring import halving, token_budget
from momentum_lm.lm.cpu_fast import inference
from momentum_lm.lm.native import NativeLM
from momentum_lm.lm.scoring import target_log_probs
from momentum_lm.model.state import Cache

from .generation import likeliest

Answer = tuple[float, bool]


def score(lm: NativeLM, requests: Sequence[Request], most: int | None = None) -> Iterator[tuple[int, Answer]]:
    """(number of a request, (log-probability of its tokens from ``start`` on in nats, whether greedy decoding gives them)), batch by batch.

    Requests of which one begins another share a row, and what many rows begin with goes through the model once. ``most``: rows in a
    batch, fewer where memory asks for it. Raises UserError where the model gives NaN or a probability of zero.
    """
    rows = _rows(requests)
    for prefix, group in _groups(requests, rows, _budget(lm, requests)):
        leaders = [requests[rows[row][0]] for row in group]
        lengths = dict(zip(group, (len(request.tokens) - 1 - len(prefix) for request in leaders), strict=True))
        budget = _budget(lm, [Request(request.tokens[len(prefix) :], 1) for request in leaders], prefix)
        cache = lm.encode_prefix(prefix) if prefix else None
        run = functools.partial(_run, lm, requests, rows, len(prefix), cache)
        for batch in batches(group, lengths.__getitem__, budget, most):
            for found in halving(run, batch):
                yield from found


def batches(items: Sequence[int], length: Callable[[int], int], budget: int, most: int | None = None) -> Iterator[list[int]]:
    """Items, longest first, in batches of at most ``budget`` tokens with padding (at least one item) and at most ``most`` items."""
    batch: list[int] = []
    for item in sorted(items, key=length, reverse=True):
        if batch and (len(batch) == most or (len(batch) + 1) * length(batch[0]) > budget):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _budget(lm: NativeLM, requests: Sequence[Request], prefix: Sequence[int] = ()) -> int:
    return token_budget(lm, Prompts(list(prefix), [[request] for request in requests], 0)) if requests else 0


def _rows(requests: Sequence[Request]) -> list[list[int]]:
    """Requests by the row that they are read from: the first of each is the row, all but its last token, and begins with the others."""
    rows: list[list[int]] = []
    for number in sorted(range(len(requests)), key=lambda n: requests[n].tokens[:-1], reverse=True):
        given = requests[number].tokens[:-1]
        row = requests[rows[-1][0]].tokens[:-1] if rows else given[:0]
        if rows and row[: len(given)] == given:
            rows[-1].append(number)
        else:
            rows.append([number])
    return rows


def _groups(requests: Sequence[Request], rows: Sequence[Sequence[int]], worth: int) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens that all begin with, rows). ``rows`` are sorted, so that those with the longest beginning in common are neighbours.

    A beginning is run by itself where that saves ``worth`` tokens: it costs a pass, and its rows then make batches of their own.
    """
    heads = [requests[row[0]].tokens[: min(requests[number].start for number in row) - 1] for row in rows]
    runs: list[tuple[int, int, int]] = []  # (tokens in common, first row, row after the last)
    for i, head in enumerate(heads):
        common = common_length(heads[i - 1], head) if i else 0
        if runs and 2 * common > runs[-1][0]:  # most of what the run has in common remains
            runs[-1] = (min(runs[-1][0], common), runs[-1][1], i + 1)
        else:
            runs.append((len(head), i, i + 1))
    rest: list[int] = []
    for common, first, end in runs:
        if common * (end - first - 1) >= worth:
            yield list(heads[first][:common]), list(range(first, end))
        else:
            rest += range(first, end)
    if rest:
        shared = functools.reduce(lambda start, i: start[: common_length(start, heads[i])], rest, heads[rest[0]])
        yield list(shared) if len(shared) * (len(rest) - 1) >= worth else [], rest


@inference
def _run(
    lm: NativeLM, requests: Sequence[Request], rows: Sequence[Sequence[int]], skip: int, prefix: Cache | None, batch: Sequence[int]
) -> list[tuple[int, Answer]]:
    """The answers of a batch's requests, whose first ``skip`` tokens are in ``prefix``."""
    given = [requests[rows[row][0]].tokens[skip:-1] for row in batch]
    tokens = torch.full((len(batch), max(map(len, given))), lm.config.padding_idx)
    wanted = []  # (row, position, target)
    for i, row in enumerate(batch):
        tokens[i, : len(given[i])] = torch.tensor(given[i])
        for request in (requests[number] for number in rows[row]):
            wanted += [(i, j - 1 - skip, request.tokens[j]) for j in range(request.start, len(request.tokens))]
    cache = None if prefix is None else prefix.rows(len(batch), frozen=True)
    hidden = lm.model.features(tokens.to(lm.device), cache, left_padded=False)
    best = torch.empty_like(tokens)

    def logits_at(row: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = lm.model.output_projection(hidden[row.to(lm.device), position.to(lm.device)])
        best[row, position] = likeliest(logits, lm.config.padding_idx).cpu()
        return logits

    place, column, target = torch.tensor(wanted).unbind(1)
    values = target_log_probs(logits_at, place, column, target, lm.vocab_size).double().tolist()
    agreed = (best[place, column] == target).tolist()
    if not all(map(isfinite, values)):
        raise UserError(f"{lm.name} gives probabilities of 0 or NaN: its weights are broken, or too large for {lm.dtype}")
    found, first = [], 0
    for number in (number for row in batch for number in rows[row]):
        end = first + len(requests[number].tokens) - requests[number].start
        found.append((number, (sum(values[first:end]), all(agreed[first:end]))))
        first = end
    return found

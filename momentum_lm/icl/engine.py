"""Scores continuations and generates text: finds what prompts have in common, lays out rows, and runs them in batches.

A *request* is a context and the continuation whose log-probability is wanted. Requests whose scores are wanted
together, such as the choices of one example, make a *query*. What the prompts of many queries begin with goes through
the model once, and each row then costs only its own tokens; requests of which one begins another share a row, so labels
of one token each cost one row a query. Batches hold queries of similar length, at most so many tokens with padding, and
are numbered: the same queries and budget give the same batches, so that work can be shared and resumed by number.
"""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momentum_lm.lm.protocol import LanguageModel
from momentum_lm.lm.scoring import broken_weights

from .sampling import likeliest

T = TypeVar("T")
CPU_MEMORY = 256 << 20  # bytes that a batch may take beside the model and the shared beginning
CPU_TOKENS = 512  # more at once are not faster on a CPU
GPU_SHARE = 0.4  # of the memory that is free when scoring begins
MOST_GENERATED = 64  # rows that are generated together


@dataclass(frozen=True)
class Request:
    """The log-probability of ``continuation`` after ``context``: token ids, at least one of each."""

    context: array[int]
    continuation: array[int]

    @property
    def tokens(self) -> array[int]:
        """All of them."""
        return self.context + self.continuation

    @property
    def read(self) -> array[int]:
        """What the model must read: all but the last token, from which nothing is predicted."""
        return self.context + self.continuation[:-1]


Query = Sequence[Request]


class Answer(NamedTuple):
    """Log-probability of a request in nats, and whether greedy decoding would give its continuation."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class Batch:
    """Numbers of ``queries`` that go through the model together; their prompts have the first ``shared`` tokens in
    common."""

    queries: Sequence[int]
    shared: int


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


# Scoring


def score(lm: LanguageModel, requests: Sequence[Request], most_rows: int | None = None) -> Iterator[tuple[int, Answer]]:
    """(number of a request, its answer) for any requests, batch by batch, at most ``most_rows`` rows in each.

    Beginnings that many requests have in common are found among all of them. Raises UserError where the model gives NaN
    or a probability of zero.
    """
    rows = _rows_of_all(requests)
    queries = [[requests[number] for number in row] for row in rows]
    budget = functools.partial(token_budget, lm)
    worth = budget(0, max((len(query[0].read) for query in queries), default=1))
    for _, answers in score_batches(lm, queries, plan(queries, budget, most_rows, worth=worth)):
        for row, found in answers.items():
            yield from zip(rows[row], found, strict=True)


def score_batches(
    lm: LanguageModel,
    queries: Sequence[Query],
    batches: Sequence[Batch],
    padding_side: str = "right",
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[int, dict[int, list[Answer]]]]:
    """(number of a batch, {query: answers to its requests}) for the batches with these ``numbers``, or for all.

    Raises UserError where the model gives NaN or a probability of zero.
    """
    beginning: array[int] = array("i")
    state = None
    for number in range(len(batches)) if numbers is None else numbers:
        batch = batches[number]
        first = queries[batch.queries[0]][0].context[: batch.shared]
        if first != beginning:
            state = None  # before there is another
            beginning, state = first, lm.start(first) if first else None
        run = functools.partial(_answer_some, lm, queries, batch.shared, state, padding_side)
        answers = list(itertools.chain(*halving(run, batch.queries)))
        if not all(isfinite(answer.log_prob) for found in answers for answer in found):
            raise broken_weights(lm)
        yield number, dict(zip(batch.queries, answers, strict=True))


def _answer_some(
    lm: LanguageModel, queries: Sequence[Query], shared: int, state: Any, side: str, some: Sequence[int]
) -> list[list[Answer]]:
    return Rows([queries[query] for query in some], shared, side).answers(lm, state)


class Rows:
    """What a batch of queries puts into a model after the first ``shared`` tokens of all prompts: tokens (B, T),
    padding (B, T) bool, and target n (``targets[n]``) after column ``positions[n]`` of row ``rows[n]``.

    ``whole_first``: the first rows are the first requests of the queries, in their order, whole.
    """

    def __init__(
        self, queries: Sequence[Query], shared: int = 0, side: str = "right", whole_first: bool = False
    ) -> None:
        self.queries = queries
        placed = [(i, *row) for i, query in enumerate(queries) for row in _rows(query, whole_first)]
        if whole_first:
            placed.sort(key=lambda row: 0 not in row[2])
        longest = max(len(row) for _, row, _ in placed) - shared
        tokens = np.zeros((len(placed), longest), dtype=np.int64)
        padding = np.ones((len(placed), longest), dtype=bool)
        targets = []  # (row, column, target)
        self._owners: list[tuple[int, int, int]] = []  # (query, request, number of its tokens)
        for i, (query, row, numbers) in enumerate(placed):
            shift = longest + shared - len(row) if side == "left" else 0
            span = slice(shift, shift + len(row) - shared)
            tokens[i, span], padding[i, span] = row[shared:], False
            for number in numbers:
                request = queries[query][number]
                column = shift + len(request.context) - 1 - shared
                targets += [(i, column + j, token) for j, token in enumerate(request.continuation)]
                self._owners.append((query, number, len(request.continuation)))
        self.tokens, self.padding = torch.from_numpy(tokens), torch.from_numpy(padding)
        self.rows, self.positions, self.targets = torch.tensor(targets).unbind(1)

    def answers(self, lm: LanguageModel, state: Any = None) -> list[list[Answer]]:
        """The answers to all requests of each query, finite or not; ``state``: of ``lm`` after the shared tokens."""
        found = lm.log_probs(self.tokens, self.padding, self.rows, self.positions, self.targets, state)
        values, greedy = iter(found[0].double().tolist()), iter(found[1].tolist())
        answers: list[dict[int, Answer]] = [{} for _ in self.queries]
        for query, number, count in self._owners:
            total, written = sum(itertools.islice(values, count)), list(itertools.islice(greedy, count))
            answers[query][number] = Answer(total, all(written))
        return [[own[number] for number in range(len(own))] for own in answers]


def log_probs(answers: Mapping[int, Sequence[Answer]]) -> dict[int, list[float]]:
    """{query: log-probability of each of its requests}."""
    return {query: [answer.log_prob for answer in found] for query, found in answers.items()}


def best(query: Query, answers: Sequence[Answer], kind: str = "mean") -> int:
    """The number of the request with the highest score, the first of equals; ``kind``: of :meth:`Scores.values`."""
    return int(collect([query], log_probs({0: answers})).values(kind)[0].argmax())


def collect(queries: Sequence[Query], sums: Mapping[int, Sequence[float]]) -> Scores:
    """The log-probabilities of all queries' requests as arrays."""
    choices = max(len(query) for query in queries)
    table = np.full((len(queries), choices), np.nan)
    counts = np.zeros((len(queries), choices), dtype=np.int64)
    for i, query in enumerate(queries):
        table[i, : len(query)] = sums[i]
        counts[i, : len(query)] = [len(request.continuation) for request in query]
    return Scores(table, counts)


# Rows and batches


def shared_length(queries: Iterable[Query]) -> int:
    """The number of tokens that all prompts begin with. The last of each context stays in the row: it predicts."""
    shared: array[int] | None = None
    for request in itertools.chain.from_iterable(queries):
        context = request.context[:-1]
        shared = context if shared is None else shared[: common_length(shared, context)]
    return len(shared or ())


def extent(query: Query) -> tuple[int, int]:
    """(rows, tokens of the longest one) that a query needs."""
    return len(_rows(query)), max(len(request.context) + len(request.continuation) - 1 for request in query)


def token_budget(lm: LanguageModel, shared: int, longest: int) -> int:
    """How many tokens a batch of rows, of which the longest has ``longest`` after ``shared``, may hold: on a GPU a
    share of the free memory, on a CPU a fixed amount."""
    row = lm.row_bytes(shared, longest)
    if lm.device.type == "cuda":
        return max(1, int(GPU_SHARE * torch.cuda.mem_get_info(lm.device)[0]) // row) * longest
    return min(CPU_TOKENS, max(1, CPU_MEMORY // row) * longest)


def query_budget(lm: LanguageModel, queries: Sequence[Query]) -> int:
    """:func:`token_budget` for batches that share what all prompts begin with."""
    shared = shared_length(queries)
    return token_budget(lm, shared, max(extent(query)[1] for query in queries) - shared)


def plan(
    queries: Sequence[Query],
    budget: int | Callable[[int, int], int],
    most_rows: int | None = None,
    share: bool = True,
    worth: int | None = None,
) -> list[Batch]:
    """Batches of queries, longest first, of at most ``most_rows`` rows and ``budget`` tokens with padding (but at least
    one query); ``budget`` may be a function of the shared tokens and the longest row after them.

    What all prompts begin with is read once, unless not ``share``; with ``worth`` any beginning that some have in
    common, where that saves so many tokens. The same queries and arguments give the same batches.
    """
    if not queries:
        return []
    limit = budget if callable(budget) else lambda *unused: budget
    extents = [extent(query) for query in queries]
    groups = [(shared_length(queries) if share else 0, list(range(len(queries))))]
    if worth is not None:
        groups = list(_groups(queries, worth))
    planned = []
    for shared, group in groups:
        sizes = [(extents[query][0], extents[query][1] - shared) for query in group]
        allowed = limit(shared, max(longest for _, longest in sizes))
        planned += [Batch([group[i] for i in batch], shared) for batch in batches(sizes, allowed, most_rows)]
    return planned


def batches(sizes: Sequence[tuple[int, int]], budget: int, most_rows: int | None = None) -> list[list[int]]:
    """Numbers of items, each so many rows of at most so many tokens (``sizes``), in batches: longest first, each of at
    most ``budget`` tokens with padding and ``most_rows`` rows, and at least one item."""
    found: list[list[int]] = []
    rows = longest = 0
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], i)):
        rows += sizes[item][0]
        if not found or rows * longest > budget or (most_rows is not None and rows > most_rows):
            found.append([])
            rows, longest = sizes[item]
        found[-1].append(item)
    return found


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


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    short = min(len(a), len(b))
    if a[:short] == b[:short]:
        return short
    return next(i for i in range(short) if a[i] != b[i])


def _rows(query: Query, whole_first: bool = False) -> list[tuple[array[int], list[int]]]:
    """The fewest rows of tokens from which all requests can be read, and which are read from each: one that begins
    another needs none of its own. ``whole_first``: the first row is the first request, its last token included."""
    read = [request.read for request in query]
    rows: list[tuple[array[int], list[int]]] = [(query[0].tokens, [])] if whole_first else []
    for number in sorted(range(len(query)), key=lambda n: (-len(read[n]), n)):
        own = next((numbers for row, numbers in rows if row[: len(read[number])] == read[number]), None)
        if own is None:
            rows.append((read[number], [number]))
        else:
            own.append(number)
    return rows


def _rows_of_all(requests: Sequence[Request]) -> list[list[int]]:
    """Numbers of requests by the row that they can be read from; the first begins with all others."""
    read = [request.read for request in requests]
    rows: list[list[int]] = []
    for number in sorted(range(len(requests)), key=read.__getitem__, reverse=True):
        if rows and read[rows[-1][0]][: len(read[number])] == read[number]:
            rows[-1].append(number)
        else:
            rows.append([number])
    return rows


def _groups(queries: Sequence[Query], worth: int) -> Iterator[tuple[int, list[int]]]:
    """(tokens that all prompts begin with, queries). A beginning is run by itself where that saves ``worth`` tokens: it
    costs a pass, and its queries then make batches of their own."""
    heads = [queries[i][0].context[: shared_length([query])] for i, query in enumerate(queries)]
    order = sorted(
        range(len(queries)), key=heads.__getitem__
    )  # those with the longest beginning in common are neighbours
    runs: list[tuple[int, int, int]] = []  # (tokens in common, first place in the order, place after the last)
    for i, query in enumerate(order):
        common = common_length(heads[order[i - 1]], heads[query]) if i else 0
        if runs and 2 * common > runs[-1][0]:  # most of what the run has in common remains
            runs[-1] = (min(runs[-1][0], common), runs[-1][1], i + 1)
        else:
            runs.append((len(heads[query]), i, i + 1))
    rest: list[int] = []
    for common, first, end in runs:
        if common * (end - first - 1) >= worth:
            yield common, order[first:end]
        else:
            rest += order[first:end]
    if rest:
        shared = shared_length([queries[query] for query in rest])
        yield shared if shared * (len(rest) - 1) >= worth else 0, rest


# Generating


def generate(
    lm: LanguageModel,
    contexts: Sequence[Sequence[int]],
    most: int,
    stop: Callable[[list[int]], bool] = lambda tokens: False,
    choose: Callable[[Tensor], Tensor] = likeliest,
    most_rows: int = MOST_GENERATED,
) -> Iterator[tuple[int, list[int]]]:
    """(number of a context, what follows it), batch by batch: at most ``most`` tokens, up to one that ends a text
    (``lm.ends``), which is left out.

    ``contexts``: token ids, at least one each; beginnings in common are read once. ``choose`` maps logits (N, V) to
    tokens (N,). ``stop`` says, after each token, whether a continuation ends with it. Raises UserError where the model
    gives NaN.
    """
    if not contexts:
        return
    queries = [[Request(array("i", context), array("i", [0]))] for context in contexts]  # of some continuation
    longest = max(map(len, contexts))
    rows = min(most_rows, row_budget(lm, longest + most))
    for batch in plan(queries, rows * longest, rows, worth=token_budget(lm, 0, longest)):
        first = queries[batch.queries[0]][0].context[: batch.shared]
        run = functools.partial(
            _generate, lm, queries, batch.shared, lm.start(first) if first else None, most, stop, choose
        )
        yield from zip(batch.queries, itertools.chain(*halving(run, batch.queries)), strict=True)


def row_budget(lm: LanguageModel, length: int) -> int:
    """How many rows of ``length`` tokens memory allows at once, with what all layers remember of them."""
    free = GPU_SHARE * torch.cuda.mem_get_info(lm.device)[0] if lm.device.type == "cuda" else CPU_MEMORY
    return max(1, int(free) // lm.row_bytes(0, length, keeps=True))


def _generate(
    lm: LanguageModel,
    queries: Sequence[Query],
    shared: int,
    prefix: Any,
    most: int,
    stop: Callable[[list[int]], bool],
    choose: Callable[[Tensor], Tensor],
    some: Sequence[int],
) -> list[list[int]]:
    rows = [queries[number][0].context[shared:] for number in some]
    state = None if prefix is None else prefix.rows(len(rows))
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    padding = torch.arange(longest) < torch.tensor([[longest - len(row)] for row in rows])
    found: list[list[int]] = [[] for _ in rows]
    running = list(range(len(rows)))  # the row of `found` that each row of the state continues
    for _ in range(most):
        logits, state = lm.step(tokens, padding, state)
        if logits.isnan().any():
            raise broken_weights(lm)
        chosen = choose(logits)
        going = []
        for row, token in enumerate(chosen.tolist()):
            if token not in lm.ends:
                found[running[row]].append(token)
                if not stop(found[running[row]]):
                    going.append(row)
        if not going:
            break
        if len(going) < len(running):
            index = torch.tensor(going, device=chosen.device)
            state.select(index)
            chosen, running = chosen[index], [running[row] for row in going]
        tokens = chosen[:, None].cpu()
        padding = torch.zeros_like(tokens, dtype=torch.bool)
    return found

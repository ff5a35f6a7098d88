"""Scores of a batch together with its attention, from one forward pass; and where tokens of two prompts correspond."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from momentum_lm.icl.engine import Query, Rows
from momentum_lm.icl.finetuning import Diverged, Lesson, finetuned
from momentum_lm.lm.anatomy import key_value_weights
from momentum_lm.lm.protocol import LanguageModel
from momentum_lm.lm.tracing import AttentionTrace, tracing

Floats = NDArray[np.float32]
PAPER, PREDICTING = (
    0,
    1,
)  # the two positions of a row that are looked at: the last token of its first choice, and the query's last


class TracedModel(LanguageModel, Protocol):
    """A language model whose module can be looked into and finetuned."""

    @property
    def model(self) -> Any: ...


# With rotary positions the first layer's maps, and what a query sees that reaches no demonstration, differ by rounding
# alone: in fp32 by this much, in bf16 and fp16 by what these round to.
NOISE = 1e-4


@dataclass
class Seen:
    """One batch of N queries in one setting: ``sums`` ``{query: log-probabilities of its requests}``, and for L layers
    and the P = 2 positions outputs (L, N, P, C), logits (one (N, P, H, S) a layer) and queries (L, N, P, H * D);
    ``trace`` holds the rest. noise: the length of a change, relative to what changes, that may be rounding alone.
    """

    sums: dict[int, list[float]]
    outputs: Floats
    logits: list[Floats]
    queries: Floats
    trace: AttentionTrace
    noise: float


def trace_queries(
    lm: TracedModel,
    queries: Mapping[int, Query],
    shared: int = 0,
    state: Any = None,
    projections: bool = False,
    relax: bool = False,
) -> Seen:
    """Scores queries (by number) and records the attention of the first request of each.

    ``state``: of ``lm`` after the first ``shared`` tokens, which all prompts have in common. Sums are not finite where
    the model is broken.
    """
    rows = Rows(list(queries.values()), shared, whole_first=True)
    firsts = [query[0] for query in queries.values()]
    positions = torch.tensor([[len(first.tokens) - 1, len(first.context) - 1] for first in firsts]) - shared
    trace = AttentionTrace(positions + getattr(state, "read_again", 0), projections, relax)
    with tracing(lm.model, trace):
        answers = rows.answers(lm, state)
    sums = {query: [answer.log_prob for answer in found] for query, found in zip(queries, answers, strict=True)}
    logits = [to_numpy(layer) for layer in trace.logits]
    noise = max(NOISE, torch.finfo(lm.dtype).eps)
    return Seen(sums, stacked(trace.outputs), logits, stacked(trace.queries), trace, noise)


def to_numpy(tensor: Tensor) -> Floats:
    """float32 on the CPU, of the same shape."""
    return tensor.detach().float().cpu().numpy()


def stacked(layers: Sequence[Tensor]) -> Floats:
    """L arrays of one shape -> (L, ...), float32."""
    return np.stack([to_numpy(layer) for layer in layers])


def common_suffix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both end."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Aligned:
    """Where the demonstrations' tokens stand: ``context`` indices in the prompt; ``kept[i]`` the slice of lesson i's
    own tokens that is found there (all of them, unless a tokenizer joins what stands at a seam).
    """

    context: NDArray[np.int64]
    kept: list[slice]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each demonstration."""
        return [span.stop - span.start for span in self.kept]


def align(prompt: Sequence[int], demonstrations: Sequence[Sequence[int]], begin: int) -> Aligned | None:
    """Finds each demonstration's tokens in the prompt, in order, from ``begin`` on; None where a tokenizer makes them
    too different.
    """
    found: list[int] = []
    kept: list[slice] = []
    place = begin
    for tokens in demonstrations:
        trims = sorted(((i, j) for i in range(3) for j in range(3) if i + j < len(tokens)), key=sum)
        hit = None
        for first, last in trims:
            part = list(tokens[first : len(tokens) - last])
            window = range(place, min(place + 8, len(prompt) - len(part) + 1))  # separators are short
            start = next((s for s in window if list(prompt[s : s + len(part)]) == part), None)
            if start is not None:
                hit = start, slice(first, len(tokens) - last)
                break
        if hit is None:
            return None
        start, span = hit
        found += range(start, start + span.stop - span.start)
        kept.append(span)
        place = start + span.stop - span.start
    return Aligned(np.array(found, dtype=np.int64), kept)


class Learned:
    """Weights after finetuning, kept beside the model's own and put in their place only for as long as :meth:`applied`
    lasts.

    queries: per lesson and layer (T, H * D), if kept; losses: before each step.
    """

    def __init__(
        self,
        lm: TracedModel,
        lessons: Sequence[Lesson],
        rate: float,
        parameters: str,
        layerwise: bool = False,
        keep_queries: bool = False,
    ) -> None:
        with finetuned(lm.model, lessons, rate, parameters, layerwise, keep_queries) as done:
            self._parameters = done.parameters
            self._values = [parameter.detach().clone() for parameter in done.parameters]
        self.losses, self.queries = done.losses, done.queries
        if not all(bool(torch.isfinite(value).all()) for value in self._values):
            raise Diverged(f"weights are no longer finite after {len(self.losses)} steps at learning rate {rate:g}")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with these weights. Tensors change places, so that what was there is there again, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._values[i] = self._values[i], parameter.data

    def update(self, model: Any) -> list[tuple[Tensor, ...]]:
        """Per layer the change of key weight (Hkv * D, C), key bias (Hkv * D,), value weight and value bias; nothing
        where they are not found.
        """
        before = key_value_weights(model)
        with self.applied():
            after = key_value_weights(model)
        return [tuple(b - a for a, b in zip(one, other, strict=True)) for one, other in zip(before, after, strict=True)]


def demonstration_matrices(
    lm: TracedModel, context: Sequence[int], begin: int, heads: int, seed: Sequence[int]
) -> tuple[Floats, Floats]:
    """dW_ICL of every layer and key/value head, (L, G, D, D), of the prompt's tokens from ``begin`` on: all
    demonstrations. Also what the same keys and values give when the keys are dealt out among the tokens at random.
    """
    trace = AttentionTrace(torch.tensor([[len(context) - 1]]), projections=True)
    with tracing(lm.model, trace):
        _run(lm, context)
    order = torch.from_numpy(np.random.default_rng(list(seed)).permutation(len(context) - begin))
    found: list[list[Floats]] = [[], []]
    for keys, values in zip(trace.keys, trace.values, strict=True):
        k, v = (x[0, begin:].float().unflatten(-1, (heads, -1)) for x in (keys, values))
        for kept, dealt in zip(found, (k, k[order.to(k.device)]), strict=True):
            kept.append(to_numpy(torch.einsum("tgd,tge->gde", v, dealt)))
    return np.array(found[0]), np.array(found[1])


def _run(lm: TracedModel, tokens: Sequence[int]) -> None:
    row = torch.tensor([list(tokens)])
    last = torch.tensor([len(tokens) - 1])
    lm.log_probs(row, torch.zeros_like(row, dtype=torch.bool), torch.tensor([0]), last, row[0, -1:], None)


def finetuning_similarity(
    zero_shot: AttentionTrace, update: Sequence[tuple[Tensor, ...]], icl: Floats, spans: Sequence[tuple[int, int]]
) -> Floats:
    """cos(dW_ICL, dW_FT) in the Frobenius inner product, (N, L, G): per example, layer and key/value head.

    dW_FT = (W_V + dW_V) X X^T (W_K + dW_K)^T - W_V X X^T W_K^T (Eq. 13) as V^T dK + dV^T (K + dK), which has no
    difference of large terms; X are the tokens from spans[n][0] up to spans[n][1] of the zero-shot row. icl (L, G, D,
    D). NaN for a zero update.
    """
    result = []
    groups = icl.shape[1]
    for layer, changes in enumerate(update):
        inputs, keys, values = (
            found[layer][: len(spans)].float() for found in (zero_shot.inputs, zero_shot.keys, zero_shot.values)
        )
        columns = torch.arange(inputs.shape[1])
        mask = torch.stack([(columns >= first) & (columns < end) for first, end in spans])[..., None].to(inputs.device)
        change_k, change_v = F.linear(inputs, *changes[:2]) * mask, F.linear(inputs, *changes[2:]) * mask
        k, v, dk, dv = (x.unflatten(-1, (groups, -1)) for x in (keys * mask, values * mask, change_k, change_v))
        matrices = torch.einsum("ntgd,ntge->ngde", v, dk) + torch.einsum("ntgd,ntge->ngde", dv, k + dk)
        flat, other = to_numpy(matrices).reshape(len(spans), groups, -1), icl[layer].reshape(groups, -1)
        with np.errstate(invalid="ignore", divide="ignore"):
            result.append((flat * other).sum(-1) / (np.linalg.norm(flat, axis=-1) * np.linalg.norm(other, axis=-1)))
    return np.stack(result, axis=1)

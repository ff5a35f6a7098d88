"""Metrics of ICL against finetuning for a batch of examples, from the traces of three settings (:mod:`.traces`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from momentum_lm.analysis import metrics
from momentum_lm.analysis.per_example import PerExample

from .controls import Control
from .traces import PAPER, PREDICTING, Aligned, Floats, Learned, Seen, common_suffix, finetuning_similarity, to_numpy

KENDALL_EXAMPLES = 100  # the authors rank attention for no more examples
SHOWN_EXAMPLES = 3  # of which attention to each demonstration is kept, to be drawn
Values = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The prompts of one example with its first choice, token by token, and where that choice begins in each."""

    zero_shot: Sequence[int]
    in_context: Sequence[int]
    zero_shot_start: int
    in_context_start: int
    begin: int  # tokens before the query in ``zero_shot``: BOS

    def query(self, position: int) -> tuple[slice, slice]:
        """Columns of the query's own tokens in both prompts: those with which both end, up to the position that is
        looked at."""
        zero, context = self.zero_shot, self.in_context
        if position == PREDICTING:
            zero, context = zero[: self.zero_shot_start], context[: self.in_context_start]
        count = min(common_suffix(zero, context), len(zero) - self.begin)
        return slice(len(zero) - count, len(zero)), slice(len(context) - count, len(context))

    @property
    def own(self) -> tuple[int, int]:
        """First column, and the one after the last, of the query's tokens in the zero-shot prompt without its
        choice."""
        return self.begin, self.zero_shot_start


class FinetunedModel:
    """A finetuned model as the metrics need it, and its queries while it was trained, in order of the prompt's tokens.

    queries: (L, N, H * D) scaled, None where the lessons are not what the prompt shows.
    """

    def __init__(self, control: Control, learned: Learned, aligned: Aligned | None, begin: int) -> None:
        self.control, self.learned = control, learned
        self.queries: Floats | None = None
        if aligned is not None and learned.queries:
            first = learned.queries[0][0]
            self.queries = np.empty(
                (len(learned.queries[0]), sum(aligned.lengths), first.shape[-1]), dtype=to_numpy(first[:0]).dtype
            )
            place = 0
            for span in aligned.kept:
                lesson, end = (
                    learned.queries.pop(0),
                    place + span.stop - span.start,
                )  # popped: they are as large as what is made of them
                for layer, queries in enumerate(lesson):
                    self.queries[layer, place:end] = to_numpy(queries[begin + span.start : begin + span.stop])
                place = end
        learned.queries = []


def measure(
    zero_shot: Seen,
    icl: Seen,
    ft: Seen,
    batch: Sequence[int],
    rows: Sequence[Rows],
    aligned: Aligned | None,
    model: FinetunedModel,
    update: Sequence[tuple[torch.Tensor, ...]],
    matrices: tuple[Floats, Floats] | None,
    seed: int,
    into: dict[str, PerExample],
) -> dict[int, Floats]:
    """Adds the metrics of a batch to ``into["paper"]``, ``into["corrected"]`` (L,) and ``into["heads"]`` (L, H).

    ``update``: what :meth:`Learned.update` says of the model. With its ``own_controls`` also random updates,
    similarities before finetuning and the relaxation, which are the same for every finetuned model. Then returns
    {example: shares of attention (2, L, M) that ICL and FT give to the M demonstrations} of the first examples.
    """
    shares: dict[int, Floats] = {}
    baselines = model.control.own_controls
    products = _products(ft, model)
    spans = [row.own for row in rows]
    weights: dict[str, Floats] = {}
    if matrices is not None and update and zero_shot.trace.keys:
        weights["dw_similarity"] = finetuning_similarity(zero_shot.trace, update, matrices[0], spans)
        weights["dw_similarity_random"] = finetuning_similarity(zero_shot.trace, update, matrices[1], spans)
    for i, (example, row) in enumerate(zip(batch, rows, strict=True)):
        key = [seed, example]
        paper, _ = _similarities(zero_shot, icl, ft, i, row, key, baselines, paper=True)
        corrected, heads = _similarities(zero_shot, icl, ft, i, row, key, baselines, paper=False)
        if aligned is not None and products is not None:
            if example < KENDALL_EXAMPLES:
                context = np.stack([layer[i, PAPER][:, aligned.context].sum(0) for layer in icl.logits])
                paper |= _attention(context, products[0][i], aligned.lengths, key, False, baselines)
            context = np.stack([layer[i, PREDICTING][:, aligned.context] for layer in icl.logits])
            found = _attention(context, products[1][i], aligned.lengths, key, True, baselines)
            if baselines and example < SHOWN_EXAMPLES:
                shares[example] = _shares(np.stack([context, products[1][i]]), aligned.lengths)
            heads["kendall"] = found["kendall"]
            corrected |= {name: _mean(value) for name, value in found.items()}
        seen = [
            bool(np.isfinite(layer[i, PREDICTING][:, row.begin : row.query(PREDICTING)[1].start]).any())
            for layer in icl.logits
        ]
        for name, value in weights.items():
            value[i, ~np.array(seen)] = np.nan  # what no query sees updates nothing
            corrected[name] = _mean(value[i])
        if "dw_similarity" in weights:
            heads["dw_similarity"] = weights["dw_similarity"][i]
        if baselines:
            corrected |= _relaxation(zero_shot, icl, ft, i)
        for part, values in (("paper", paper), ("corrected", corrected), ("heads", heads)):
            into[part].add(example, values)
    return shares


def _shares(logits: NDArray[Any], lengths: Sequence[int]) -> Floats:
    """(..., H, n) logits over the demonstrations' tokens -> (..., M): softmax, summed over each one's tokens, the mean
    over heads; 0 for heads that see none of them.
    """
    weights = np.where(np.isneginf(logits), 0.0, metrics.softmax(logits))
    return metrics.example_sums(weights, lengths).mean(-2).astype(np.float32)


def _similarities(
    zero_shot: Seen, icl: Seen, ft: Seen, i: int, row: Rows, key: Sequence[int], baselines: bool, paper: bool
) -> tuple[Values, Values]:
    """Of attention outputs and of attention to the query's own tokens: by layer, and the latter by layer and head."""
    position, noise = PAPER if paper else PREDICTING, zero_shot.noise
    h_zs, h_icl, h_ft = (seen.outputs[:, i, position] for seen in (zero_shot, icl, ft))
    (m_zs, m_icl, m_ft), seen = _maps(zero_shot, icl, ft, i, row, position)
    heads: Values = {"simam": metrics.simam(m_icl, m_ft, seen)}
    if not paper:
        heads["simam_delta"] = metrics.simam_delta(m_icl, m_ft, m_zs, seen, noise=noise)
        heads["simam_delta_centred"] = metrics.simam_delta(m_icl, m_ft, m_zs, seen, centred=True, noise=noise)
    if baselines:
        heads["simam_before"] = metrics.simam(m_icl, m_zs, seen)
    found: Values = {name: _mean(value) for name, value in heads.items()}
    found["simaou"] = metrics.simaou(h_icl, h_ft, h_zs, normalize=paper, noise=noise)
    if baselines:
        found["simaou_random"] = metrics.random_simaou(h_icl, h_zs, key, normalize=paper, noise=noise)
    return found, heads


def _maps(
    zero_shot: Seen, icl: Seen, ft: Seen, i: int, row: Rows, position: int
) -> tuple[list[NDArray[np.float32]], NDArray[np.bool_] | None]:
    """(L, H, n) logits over the query's own tokens, and (L, n) which of them attention sees in all
    settings; None: all.
    """
    short, long = row.query(position)
    columns = ((zero_shot, short), (icl, long), (ft, short))
    maps = [np.stack([layer[i, position][:, span] for layer in seen.logits]) for seen, span in columns]
    hidden = np.any([np.isneginf(m).any(1) for m in maps], axis=0)
    return maps, ~hidden if hidden.any() else None


def _products(ft: Seen, model: FinetunedModel) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The finetuned model's attention to training tokens, (N, L, n) as in the authors' code and (N, L, H, n) with one
    factor D^-0.5."""
    if model.queries is None:
        return None
    heads = ft.logits[0].shape[2]
    scale = (ft.queries.shape[-1] // heads) ** 0.5
    tests = [ft.queries[:, :, position].transpose(1, 0, 2) for position in (PAPER, PREDICTING)]
    return metrics.query_products(model.queries, tests[0]), metrics.query_products(
        model.queries, tests[1] * scale, heads
    )


def _attention(
    icl: NDArray[np.float32],
    ft: NDArray[np.float64],
    lengths: Sequence[int],
    key: Sequence[int],
    corrected: bool,
    baselines: bool,
) -> Values:
    found = {"": metrics.training_attention(icl, ft, lengths, corrected)}
    if baselines:
        found["_random"] = metrics.random_training_attention(icl, lengths, key, corrected)
    names = {
        "kendall": "kendall",
        "kendall_example": "kendall_example",
        "recall_at_k": "recall",
        "recall_at_k_example": "recall_example",
    }
    return {name + suffix: getattr(value, field) for suffix, value in found.items() for name, field in names.items()}


def _relaxation(zero_shot: Seen, icl: Seen, ft: Seen, i: int) -> Values:
    """How far attention without softmax is from attention, in context, and SimAOU of the outputs that it would give."""
    found: Values = {}
    exact, relaxed = (
        np.stack([to_numpy(x[i, PREDICTING]) for x in layers]) for layers in (icl.trace.heads, icl.trace.relaxed)
    )
    found["relaxation_cosine"] = _mean(metrics.cosine(relaxed, exact))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.linalg.norm(relaxed, axis=-1) / np.linalg.norm(exact, axis=-1)
    found["relaxation_ratio"] = _mean(np.where(np.isfinite(ratio), ratio, np.nan))
    if icl.trace.relaxed_outputs:
        h_icl, h_ft, h_zs = (
            np.stack([to_numpy(x[i, PREDICTING]) for x in seen.trace.relaxed_outputs]) for seen in (icl, ft, zero_shot)
        )
        found["simaou_relaxed"] = metrics.simaou(h_icl, h_ft, h_zs, normalize=False, noise=zero_shot.noise)
    return found


def _mean(values: NDArray[Any]) -> NDArray[Any]:
    """Over heads, the last axis, without those that have no value."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(-1) / known.sum(-1))

"""Calibration of label scores: contextual, domain PMI and batch. NumPy, float64, no model: everything is computed from
scores.

``scores`` (n, C) are log-probabilities of the choices, summed or averaged over their tokens. Examples with fewer
choices than others have NaN at the end of their rows; NaN stays NaN. The prediction is the largest score that is not
NaN, the lowest index among equals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

CALIBRATIONS = ("none", "contextual", "domain_pmi", "batch")


def apply(
    name: str, scores: ArrayLike, content_free: ArrayLike | None = None, domain: ArrayLike | None = None
) -> NDArray[np.float64]:
    """(n, C) calibrated scores, by one of :data:`CALIBRATIONS`.

    ``none``: the scores. ``contextual`` (Zhao et al. 2021, arXiv:2102.09690): minus the log of the labels' mean
    probability after the inputs without content, ``content_free`` (m, C). ``domain_pmi`` (Holtzman et al. 2021,
    arXiv:2104.08315): minus ``domain``, the choices' scores after the domain's premise alone: (n, C), or (C,) or (1, C)
    where all examples have the same labels. ``batch`` (Zhou et al. 2024, arXiv:2309.17249): log-probabilities of the
    labels minus the log of their mean probability over all n queries.

    Raises ValueError for an unknown name, for what a method needs and has not got, for arrays that do not fit, and for
    ``contextual`` and ``batch`` where examples have different numbers of choices: they need one list of labels.
    """
    table = _table(scores, "scores")
    if name == "none":
        return table
    if name == "domain_pmi":
        return table - _premise(domain, table)
    if name not in CALIBRATIONS:
        raise ValueError(f"no calibration {name!r}; choose one of {', '.join(CALIBRATIONS)}")
    if np.isnan(table).any():
        raise ValueError(f"{name} calibration needs the same labels for all examples")
    if name == "batch":
        probabilities = _log_softmax(table)
        return probabilities - _log_mean(probabilities)
    if content_free is None:
        raise ValueError("contextual calibration needs the scores of inputs without content")
    reference = _table(content_free, "content_free")
    if reference.shape[1] != table.shape[1] or np.isnan(reference).any():
        raise ValueError(f"content_free must score the same {table.shape[1]} labels, got shape {reference.shape}")
    return table - _log_mean(_log_softmax(reference))


def _premise(domain: ArrayLike | None, table: NDArray[np.float64]) -> NDArray[np.float64]:
    if domain is None:
        raise ValueError("domain_pmi calibration needs the choices' scores after the domain's premise")
    premise = np.atleast_2d(np.asarray(domain, dtype=np.float64))
    if premise.shape not in (table.shape, (1, table.shape[1])):
        raise ValueError(f"domain must have shape {table.shape} or ({table.shape[1]},), got {np.shape(domain)}")
    if (np.isfinite(table) & ~np.isfinite(premise)).any():
        raise ValueError("domain lacks the score of a choice")
    return premise


def _table(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """A float64 copy, (n, C), finite but for NaN at the ends of rows."""
    table = np.array(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must have one row an example and one column a choice, got shape {table.shape}")
    missing = np.isnan(table)
    if np.isinf(table).any() or missing[:, 0].any() or (missing[:, :-1] & ~missing[:, 1:]).any():
        raise ValueError(f"{name} must be finite, with NaN only at the end of rows that have fewer choices")
    return table


def _log_softmax(table: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = table - table.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _log_mean(log_probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """(C,) log of the mean over rows, in log space: a label that is improbable everywhere must not become log 0."""
    return np.logaddexp.reduce(log_probabilities, axis=0) - np.log(len(log_probabilities))

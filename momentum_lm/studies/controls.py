"""The finetuned models of a unit: the one that is compared with ICL, and those that its similarities are compared
with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """What a similarity of ICL and finetuning is compared with, or the finetuned model itself.

    ``null``: it cannot learn what the demonstrations teach, so that only what exceeds it speaks for ICL as finetuning;
    the others are other ways of learning. ``meaning``: what is compared, for readers. ``of_run``: a metric of
    the run itself (``simaou_random``), not a model; the models for which these are measured have ``own_controls``. How
    a model is finetuned: on demonstrations with ``shuffled`` labels, by ``layerwise`` losses, other ``parameters`` than
    the study's. ``required``: it must not diverge. ``look`` numbers its line in figures.
    """

    title: str
    meaning: str
    null: bool = False
    of_run: bool = False
    own_controls: bool = False
    shuffled: bool = False
    layerwise: bool = False
    parameters: str | None = None
    required: bool = False
    look: int = 1


FINETUNED = Control(
    "ICL and FT",
    "the model with demonstrations in its prompt (ICL), beside the model finetuned on them (FT).",
    own_controls=True,
    required=True,
    look=0,
)
CONTROLS = {
    "random": Control(
        "random",
        "in FT's place: for SimAOU a random update, for Kendall and recall tokens in a random order, for "
        "cos(dW_ICL, dW_FT) the demonstrations' keys dealt out anew among their values.",
        null=True,
        of_run=True,
        look=1,
    ),
    "before": Control(  # of metrics without a random update
        "before finetuning",
        "the model without demonstrations, not yet finetuned, in FT's place.",
        null=True,
        of_run=True,
        look=1,
    ),
    "untrained": Control(  # finetuned alike, beside none
        "untrained", "ICL and FT in the same architecture with fresh weights.", null=True, own_controls=True, look=2
    ),
    "shuffled_labels": Control(
        "shuffled labels",
        "finetuned on the demonstrations with their labels shuffled, in FT's place. A weak control: with two balanced "
        "labels about half keep their label by chance.",
        null=True,
        shuffled=True,
        look=3,
    ),
    "lcgd": Control(
        "LCGD",
        "layer-causal gradient descent in FT's place: every layer learns from its own output (arXiv 2311.07772). "
        "Another way of learning, not a control.",
        layerwise=True,
        look=4,
    ),
    "all_parameters": Control(
        "all parameters",
        "all parameters finetuned, not keys and values alone, in FT's place. Another way of learning, not a control.",
        parameters="all",
        look=5,
    ),
}
DEFAULT = ("untrained", "random", "shuffled_labels", "lcgd")
CHOICES = (*DEFAULT, "all_parameters")  # of --controls; random updates are always among the results


def beside(names: Collection[str]) -> dict[str, Control]:
    """The finetuned models that are measured together, by name: the one itself and the chosen controls."""
    chosen = {n: c for n, c in CONTROLS.items() if n in names and not (c.of_run or c.own_controls)}
    return {"finetuned": FINETUNED, **chosen}

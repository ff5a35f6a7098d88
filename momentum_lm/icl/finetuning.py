"""The paper's finetuning: plain SGD on the demonstrations, one a step, in order, once (arXiv 2212.10559, section 4.1).

By default on the key and value projections only, weights and biases; the weights are as before, bitwise, when it is
over.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_lm.errors import UserError, arg
from momentum_lm.lm.anatomy import OTHERS, anatomy, logits_of
from momentum_lm.lm.tracing import AttentionTrace, tracing


class Diverged(ValueError):
    """The loss is no longer a number: the learning rate is too large."""


@dataclass(frozen=True)
class Lesson:
    """One example to learn: all its tokens, of which those from ``start`` on are predicted (the first cannot be)."""

    tokens: Sequence[int]
    start: int = 1


@dataclass
class Finetuning:
    """What happened: the parameters that learn, the loss before each step, and, if asked for, each lesson's attention
    queries at that time, per lesson and layer (T, H * D), scaled."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    queries: list[list[Tensor]] = field(default_factory=list)


@contextlib.contextmanager
def finetuned(
    model: Any,
    lessons: Sequence[Lesson],
    learning_rate: float,
    parameters: str = "kv",
    layerwise: bool = False,
    keep_queries: bool = False,
) -> Iterator[Finetuning]:
    """The model after finetuning, for as long as the context lasts.

    The loss of a step is the mean cross entropy over a lesson's predicted tokens. ``parameters``: ``kv``, ``all``, or a
    regular expression that full names must match. ``layerwise``: every block learns from its own output's prediction,
    through the model's final norm and unembedding, and nothing flows back between blocks (LCGD, Deutch et al., arXiv
    2311.07772).

    Raises :class:`Diverged` when a loss is not finite (the weights are restored), UserError where it was not before
    anything was learnt, or the projections cannot be found.
    """
    chosen = _choose(model, parameters)
    before = [parameter.detach().clone() for parameter, _ in chosen]
    done = Finetuning([parameter for parameter, _ in chosen])
    try:
        for parameter, _ in chosen:
            parameter.requires_grad_(True)
        for lesson in lessons:
            _step(model, lesson, chosen, learning_rate, layerwise, keep_queries, done)
        for parameter, _ in chosen:
            parameter.requires_grad_(False)
        yield done
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(chosen, before, strict=True):
                parameter.requires_grad_(False)
                parameter.copy_(value)
                parameter.grad = None


def _step(
    model: Any,
    lesson: Lesson,
    chosen: list[tuple[nn.Parameter, Tensor | None]],
    rate: float,
    layerwise: bool,
    keep: bool,
    done: Finetuning,
) -> None:
    device = chosen[0][0].device
    tokens = torch.tensor([list(lesson.tokens)], device=device)
    targets = tokens[0, lesson.start :]
    predicting = slice(lesson.start - 1, -1)
    trace = AttentionTrace()
    with torch.enable_grad(), tracing(model, trace) if keep else contextlib.nullcontext():
        if layerwise:
            whole, tuples, given = _block_outputs(model, tokens)
            outputs = [h[0, predicting] for h in whole]
            unembed = _unembedding(model, tuples, tokens[:, predicting], outputs[-1], given[0, predicting])
            losses, slopes = zip(*(_slope(unembed, h, targets) for h in outputs), strict=True)
            loss = torch.stack(losses).sum()
        else:
            outputs, slopes = [F.cross_entropy(logits_of(model, tokens)[0, predicting].float(), targets)], (None,)
            loss = outputs[0].detach()
    value = loss.item()
    if not torch.isfinite(loss):
        if not done.losses and not layerwise:
            dtype = chosen[0][0].dtype
            raise UserError(
                f"the model's loss is {value} before it is finetuned: its weights are broken, or too large for {dtype}"
            )
        raise Diverged(f"the loss is {value} after {len(done.losses)} steps at learning rate {rate:g}")
    learning = [(output, slope) for output, slope in zip(outputs, slopes, strict=True) if output.requires_grad]
    ends, starts = ([pair[i] for pair in learning] for i in (0, 1))
    gradients = torch.autograd.grad(ends, [parameter for parameter, _ in chosen], starts, allow_unused=True)
    with torch.no_grad():
        for (parameter, mask), gradient in zip(chosen, gradients, strict=True):
            if gradient is not None:
                parameter.sub_((gradient if mask is None else gradient * mask).to(parameter.dtype), alpha=rate)
    done.losses.append(value)
    if keep:
        done.queries.append([layer[0] for layer in trace.queries])


def _slope(unembed: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of predicting from one block's output (N, C), and its gradient there: one block's logits are held at a
    time."""
    leaf = hidden.detach().requires_grad_(True)
    loss = F.cross_entropy(unembed(leaf).float(), targets)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _choose(model: Any, parameters: str) -> list[tuple[nn.Parameter, Tensor | None]]:
    """The parameters to learn, each once, with a mask of what belongs to keys and values where a projection holds
    queries too."""
    named = dict(model.named_parameters())
    if parameters == "all":
        return [(parameter, None) for parameter in named.values()]
    if parameters != "kv":
        chosen: list[tuple[nn.Parameter, Tensor | None]] = [
            (p, None) for name, p in named.items() if re.fullmatch(parameters, name)
        ]
        if not chosen:
            raise UserError(
                arg(parameters=parameters),
                f": no parameter has such a name; names are like {next(iter(named))}",
            )
        return chosen
    parts = [part for layer in anatomy(model).layers for part in (layer.key, layer.value) if part is not None]
    wanted: dict[nn.Parameter, Tensor | None] = {}
    for part, parameter in [(own, parameter) for own in parts for parameter in own.module.parameters()]:
        mask, before = part.mask(parameter), wanted.get(parameter)
        wanted[parameter] = mask if mask is None or before is None else torch.maximum(before, mask)
    found = [(parameter, wanted[parameter]) for parameter in named.values() if parameter in wanted]
    if not found:
        looked_for = ", ".join(name for form in OTHERS[:2] for name in (form.key, form.value))
        raise UserError(
            f"{type(model).__name__} has no key and value projections under the names {looked_for}; give a regular "
            "expression for them with ",
            arg("parameters"),
            f" (names are like {next(iter(named))})",
        )
    return found


def _block_outputs(model: Any, tokens: Tensor) -> tuple[list[Tensor], dict[nn.Module, bool], Tensor]:
    """The output (1, T, C) of every block, none with a way back to the block before it; the blocks that give it in a
    tuple; and the model's logits.
    """
    outputs: list[Tensor] = []
    tuples: dict[nn.Module, bool] = {}

    def cut(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (given[0].detach(), *given[1:]) if given else given, {
            name: value.detach() if name == "hidden_states" else value for name, value in options.items()
        }

    def keep(module: nn.Module, given: Any, result: Any) -> None:
        tuples[module] = isinstance(result, tuple)
        outputs.append(result[0] if isinstance(result, tuple) else result)

    handles: list[Any] = []
    for block in anatomy(model).blocks:
        handles += [block.register_forward_pre_hook(cut, with_kwargs=True), block.register_forward_hook(keep)]
    try:
        logits = logits_of(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs or any(output.shape[:-1] != tokens.shape for output in outputs):
        raise _not_layerwise(model)
    return outputs, tuples, logits


def _unembedding(
    model: Any, tuples: dict[nn.Module, bool], tokens: Tensor, hidden: Tensor, logits: Tensor
) -> Callable[[Tensor], Tensor]:
    """Hidden states (N, C) -> logits (N, V), as the model makes them of its last block's output.

    tuples: the model's blocks, and whether they give a tuple; tokens (1, N): any; hidden, logits: what the last block
    gave, and the model made of it. Raises UserError where that cannot be repeated.
    """

    def unembed(states: Tensor) -> Tensor:
        with _skipped(tuples, states[None]):
            return logits_of(model, tokens)[0]

    with torch.no_grad():
        again = unembed(hidden)
    scale = float(logits.detach().float().std())
    if not torch.allclose(again.float(), logits.float(), rtol=1e-2, atol=1e-2 * scale, equal_nan=True):
        raise _not_layerwise(model)
    return unembed


@contextlib.contextmanager
def _skipped(tuples: dict[nn.Module, bool], states: Tensor) -> Iterator[None]:
    """Blocks that do nothing but give ``states``: what the model does after them, and to logits, is its own."""
    before = {block: block.__dict__.get("forward") for block in tuples}
    try:
        for block, is_tuple in tuples.items():
            given = (states,) if is_tuple else states
            block.__dict__["forward"] = lambda *unused, given=given, **unused_too: given
        yield
    finally:
        for block, forward in before.items():
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def _not_layerwise(model: Any) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be finetuned layer by layer: its blocks' outputs are not what its "
        "predictions are made of; leave lcgd out of ",
        arg("controls"),
    )

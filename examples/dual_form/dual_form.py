"""From gradient descent on a linear layer to attention and to momentum attention: each identity of the paper, with
numbers.

Small random layers in float64, so an identity holds to rounding (about 1e-15) or not at all. Ends with status 1 if one
does not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from momentum_lm.analysis import dual_form as df
from momentum_lm.analysis.statistics import t_interval
from momentum_lm.cli.options import Parser, check_seed
from momentum_lm.errors import main_guard
from momentum_lm.ops import ema
from momentum_lm.report.figures import MARKERS, Panel, draw, line_style, save_png

EXACT = 1e-10
D, HEAD, DEMOS, CONTEXT = 8, 6, 24, 5  # width of a token, of a head; demonstrations, tokens of the query
Identity = tuple[str, str, Tensor, Tensor]  # where it stands, what it says, left side, right side


def draws(seed: int) -> Callable[..., Tensor]:
    """Normal numbers of any shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def one_step(draw: Callable[..., Tensor]) -> Identity:
    """Train a linear layer for one step, or leave it and attend to the training inputs: the answer to a new input is
    the same.
    """
    weight, inputs, targets, query = draw(3, D), draw(D, DEMOS), draw(3, DEMOS), draw(D)

    def loss(outputs: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean()

    layer = weight.clone().requires_grad_(True)
    loss(layer @ inputs).backward()
    assert layer.grad is not None
    trained = weight - 0.1 * layer.grad
    attended = df.sgd_step_as_attention(weight, inputs, loss, 0.1, query)
    return "section 2.2", "one SGD step: (W0 + dW) x = W0 x + LinearAttn(E, X', x)", trained @ query, attended


def one_example_at_a_time(draw: Callable[..., Tensor]) -> Identity:
    """The paper's finetuning, a step an example: every example leaves one key (its input) and one value (its error
    signal then).
    """
    weight, inputs, targets, query = draw(3, D), draw(D, DEMOS), draw(3, DEMOS), draw(D)
    trained, signals = weight, []
    for x, y in zip(inputs.T, targets.T, strict=True):
        signals.append(df.error_signals(lambda out, y=y: ((out[:, 0] - y) ** 2).sum() / 2, trained @ x[:, None], 0.05))  # type: ignore[misc]
        trained = trained + signals[-1] @ x[None]
    attended = weight @ query + df.linear_attention(torch.cat(signals, 1), inputs, query)
    return "section 2.2", f"{DEMOS} steps, one example each: the same, E kept from each step", trained @ query, attended


def in_context(draw: Callable[..., Tensor]) -> Identity:
    """Attention without softmax is linear in the query; demonstrations add dW_ICL to the map that it applies without
    them.
    """
    w_v, w_k, demos, context, query = draw(HEAD, D), draw(HEAD, D), draw(D, DEMOS), draw(D, CONTEXT), draw(HEAD)
    updated = (df.zero_shot_weight(w_v, w_k, context) + df.icl_update(w_v, w_k, demos)) @ query
    return (
        "section 3.1",
        "attention over [X'; X] = (W_ZSL + dW_ICL) q",
        df.relaxed_attention(w_v, w_k, demos, context, query),
        updated,
    )


def finetuned(draw: Callable[..., Tensor]) -> Identity:
    """Key and value projections trained on the demonstrations, by autograd; then the head without demonstrations."""
    w_v, w_k, demos, context, query = draw(HEAD, D), draw(HEAD, D), draw(D, DEMOS), draw(D, CONTEXT), draw(HEAD)
    v, k = (w.clone().requires_grad_(True) for w in (w_v, w_k))
    targets = draw(HEAD, DEMOS)
    (((v @ demos) @ (k @ demos).T @ draw(HEAD, DEMOS) / DEMOS - targets) ** 2).mean().backward()
    assert v.grad is not None and k.grad is not None
    delta_v, delta_k = -0.1 * v.grad, -0.1 * k.grad
    update = df.zero_shot_weight(w_v, w_k, context) + df.finetuning_update(w_v, w_k, delta_v, delta_k, context)
    head = df.finetuned_attention(w_v, w_k, delta_v, delta_k, context, query)
    return "Eq. 13", "the finetuned head = (W_ZSL + dW_FT) q", head, update @ query


def regression_head(weight: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """W_V, W_K of a head that reads (x; y): keys x, values lr (y - W0 x), which are the error signals of squared error.

    Source: the construction of von Oswald et al. (arXiv 2212.07677), Proposition 1.
    """
    out, d = weight.shape
    return lr * torch.cat([-weight, torch.eye(out, dtype=weight.dtype)], 1), torch.eye(d, d + out, dtype=weight.dtype)


def attention_that_descends(draw: Callable[..., Tensor]) -> Identity:
    """With these projections dW_ICL *is* the gradient step: here the reading is no analogy."""
    weight, inputs, targets = draw(3, D), draw(D, DEMOS), draw(3, DEMOS)
    step = weight + 0.05 * (targets - weight @ inputs) @ inputs.T
    w_v, w_k = regression_head(weight, 0.05)
    updated = weight + df.icl_update(w_v, w_k, torch.cat([inputs, targets]))
    return "2212.07677", "a head whose dW_ICL is the SGD step of a regression", step, updated


def momentum(draw: Callable[..., Tensor]) -> Identity:
    """torch's SGD with momentum keeps a moving average of past gradients: eta times its buffer is the paper's sum."""
    eta, target, start = 0.7, draw(D), draw(D)
    theta = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theta], lr=0.1 * eta, momentum=eta)
    for _ in range(10):
        optimizer.zero_grad()
        (((theta - target) ** 2).sum() / 2).backward()
        optimizer.step()
    before, _ = df.momentum_sgd(start, lambda t: t - target, 0.1, eta, 9)
    _, gradients = df.momentum_sgd(start, lambda t: t - target, 0.1, eta, 10)
    moved = before - 0.1 * df.exponential_average(gradients, eta)
    return "section 5", "momentum SGD moves by sum_{i<t} eta^(t-i) g_i", theta.detach(), moved


def momentum_attention(draw: Callable[..., Tensor]) -> Identity:
    """The same average, of values in the place of gradients, is what momentum attention adds to attention."""
    eta, values = 0.7, draw(1, 1, DEMOS, HEAD)
    average, _ = ema(values, torch.tensor([eta], dtype=torch.float64).log())
    history = values[0, 0, :-1]
    return (
        "section 5",
        "MoAttn - Attn at token t = sum_{i<t} eta^(t-i) v_i",
        average[0, 0, -1],
        df.exponential_average(history, eta),
    )


IDENTITIES = (
    one_step,
    one_example_at_a_time,
    in_context,
    finetuned,
    attention_that_descends,
    momentum,
    momentum_attention,
)


def learning_panel(seed: int) -> Panel:
    """Error of W0, of one gradient step and of the head above on new inputs, over the number of demonstrations."""
    counts = [1, 2, 4, 8, 16, 32, 64, 128]
    series: dict[str, list[float]] = {"no demonstrations": [], "one SGD step": [], "attention": []}
    for count in counts:
        errors = torch.zeros(3, dtype=torch.float64)
        for run in range(200):
            draw = draws(1000 * seed + run)
            truth, weight = draw(1, D), torch.zeros(1, D, dtype=torch.float64)
            inputs, test, lr = draw(D, count), draw(D, 50), 1 / (count + D + 1)  # the best single step for such inputs
            targets = truth @ inputs
            step = weight + lr * (targets - weight @ inputs) @ inputs.T
            w_v, w_k = regression_head(weight, lr)
            attended = weight @ test + df.icl_update(w_v, w_k, torch.cat([inputs, targets])) @ test
            for i, answer in enumerate((weight @ test, step @ test, attended)):
                errors[i] += ((answer - truth @ test) ** 2).mean() / 200
        for name, error in zip(series, errors.tolist(), strict=True):
            series[name].append(error)

    def panel(axes: Any) -> None:
        axes.set(xlabel="demonstrations (x, y) in the prompt", title="A head that learns")
        axes.set(ylabel=f"squared error on new x (variance of y: {D})")
        for i, (name, errors) in enumerate(series.items()):
            style = line_style(i) if i < 2 else line_style(i) | {"linestyle": "none"}
            axes.plot(
                counts,
                errors,
                label=name,
                marker=MARKERS[i] if i == 2 else None,
                markerfacecolor="none",
                markersize=8,
                **style,
            )
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)

    return panel


def softmax_panel(seed: int, runs: int = 200) -> Panel:
    """Cosine of what demonstrations change in the head's output with softmax and in the relaxed form, over the size of
    the logits.
    """
    scales = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    centres, lows, highs = [], [], []
    for scale in scales:
        cosines = []
        for run in range(runs):
            draw = draws(1000 * seed + run)
            demos, context, query = draw(D, DEMOS), draw(D, CONTEXT), draw(HEAD)
            w_v, w_k = (
                draw(HEAD, D),
                draw(HEAD, D) * scale / math.sqrt(HEAD * D),
            )  # logits k.q have this standard deviation
            tokens = torch.cat([demos, context], 1)
            with_demos = (w_v @ tokens) @ ((w_k @ tokens).T @ query).softmax(0)
            without = (w_v @ context) @ ((w_k @ context).T @ query).softmax(0)
            cosines.append(
                float(torch.cosine_similarity(with_demos - without, df.icl_update(w_v, w_k, demos) @ query, dim=0))
            )
        interval = t_interval(cosines)
        centres.append(interval.estimate)
        lows.append(interval.low)
        highs.append(interval.high)

    def panel(axes: Any) -> None:
        axes.set(xlabel="standard deviation of attention logits", title="What the relaxation leaves out")
        axes.set(ylabel="cosine of softmax's and relaxed change")
        axes.fill_between(scales, lows, highs, alpha=0.2, linewidth=0, color=line_style(0)["color"])
        axes.plot(scales, centres, marker="o", label=f"mean of {runs} random heads, 95% interval", **line_style(0))
        axes.set_xscale("log")
        axes.set_ylim(-0.1, 1.05)

    return panel


def lag_panel(etas: Sequence[float] = (0.3, 0.5, 0.9)) -> Panel:
    """Weight of a past value in momentum attention over its distance."""
    impulse = torch.zeros(1, len(etas), 17, 1, dtype=torch.float64)
    impulse[:, :, 0] = 1
    weights = ema(impulse, torch.tensor(etas, dtype=torch.float64).log())[0][0, :, :, 0]

    def panel(axes: Any) -> None:
        axes.set(xlabel="tokens back", ylabel="weight of the value", title="What momentum adds")
        for i, eta in enumerate(etas):
            axes.plot(
                range(17), weights[i].tolist(), label=f"eta {eta}", marker=MARKERS[i], markersize=4, **line_style(i)
            )

    return panel


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the identities and draws the figure. Returns 1 if an identity does not hold."""
    parser = Parser(prog="dual_form", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("dual_form.png"), help="the figure (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random layers (default: %(default)s)")
    args = parser.parse_args(argv)
    check_seed(args.seed)
    held = True
    for number, identity in enumerate(IDENTITIES, start=1):
        where, claim, left, right = identity(draws(args.seed))
        difference = float((left - right).abs().max())
        held &= difference < EXACT
        print(f"{number}. {claim}  [{where}]")
        print(f"   left  {_numbers(left)}\n   right {_numbers(right)}")
        print(f"   largest difference {difference:.1e}{'' if difference < EXACT else ': does NOT hold'}\n")
    save_png(draw(learning_panel(args.seed), softmax_panel(args.seed), lag_panel()), args.output)
    print(f"{'All' if held else 'NOT all'} {len(IDENTITIES)} identities hold. Figure: {args.output}")
    return 0 if held else 1


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:+.4f}" for value in values.flatten()[:4].tolist()) + (" ..." if values.numel() > 4 else "")


if __name__ == "__main__":
    sys.exit(main())

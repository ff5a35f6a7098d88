"""Does momentum attention behave like gradient descent with momentum? Small decoders learn linear regression in
context, where the answers of every method are known.

    python examples/regression_in_context/regression.py --output runs/regression

A prompt is ``x_1, y_1, ..., x_n``, of a linear function of its own with noise; the decoder predicts each y from what
stands before it (arXiv 2208.01066). Its predictions are compared with those of ridge regression, which is the best
there is, and of gradient descent, gradient descent with momentum (heavy ball) and Newton's method, each with the steps
and rates that come nearest to it on other prompts. Finished runs are kept; variants and seeds may be added.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_lm.analysis.statistics import Interval, t_interval
from momentum_lm.cli.options import Parser
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import write_json
from momentum_lm.model import DecoderConfig
from momentum_lm.model.decoder import Block
from momentum_lm.model.norms import make_norm
from momentum_lm.model.positions import Rotary
from momentum_lm.report.figures import MARKERS, Panel, draw, line_style, save_png
from momentum_lm.report.tables import Table
from momentum_lm.studies.flags import choices, integers
from momentum_lm.system import progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from jobs import Job, JobError, open_config, run_all

DIMENSION, EXAMPLES, NOISE = 8, 20, 0.5  # of x; in a prompt; the standard deviation of what is added to y
TESTED = 2048  # prompts that results are of; steps and rates are chosen on a quarter as many others
BATCH, RATE = 64, 1e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "ema": dict(momentum_kind="ema", momentum_learned=True),
    "fir3": dict(momentum_kind="fir"),
    "shift": dict(momentum_kind="fir", momentum_taps=1),
    "kv_shift": dict(momentum_kind="fir", momentum_taps=1, momentum_at="keys,values", momentum_current=True),
    "canon_a": dict(momentum_kind="fir", momentum_at="input", momentum_current=True),
    "depth": dict(momentum_kind="ema", momentum_learned=True, momentum_at="depth"),
}
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
RATES, BETAS = (0.25, 0.5, 1.0, 1.5, 1.9), (0.3, 0.6, 0.9)  # in units of 1 / the largest eigenvalue
EXACT = 1e-6  # of a distance, below which it counts as none


class Regressor(nn.Module):
    """The decoder's blocks between a linear layer that reads numbers and one that predicts one."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.depth = "depth" in config.places
        self.read_in = nn.Linear(DIMENSION + 1, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.read_out = nn.Linear(config.dim, 1)
        self.rotary = Rotary(config.rotary_dim, config.rotary_base) if config.position == "rotary" else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, N, D), y (B, N) -> the predictions of y (B, N), of each from x_1, y_1, ... and its own x."""
        rows = torch.stack([F.pad(x, (0, 1)), F.pad(y[..., None], (DIMENSION, 0))], 2).flatten(1, 2)
        hidden = self.read_in(rows)
        rotation = None if self.rotary is None else self.rotary(torch.arange(rows.shape[1])[None])
        across = {"below": hidden.new_zeros(())} if self.depth else {}
        for block in self.blocks:
            hidden = block(hidden, rotation=rotation, **across)
            if across:
                hidden, across["below"] = hidden
        return self.read_out(self.norm(hidden[:, ::2])).squeeze(-1)


def decoder_config(variant: str, position: str) -> DecoderConfig:
    """The blocks of a variant: 4 layers of width 64, 4 heads."""
    shape = dict(vocab_size=8, dim=64, ffn_dim=256, layers=4, heads=4, position=position)
    return DecoderConfig(**shape, **VARIANTS[variant])


def problems(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (count, N, D) and y (count, N) = w x + noise, w of each prompt's own, all from normal distributions."""
    x = torch.randn(count, EXAMPLES, DIMENSION, generator=generator)
    w = torch.randn(count, DIMENSION, 1, generator=generator)
    return x, (x @ w).squeeze(-1) + NOISE * torch.randn(count, EXAMPLES, generator=generator)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def held_out(tested: int = TESTED) -> dict[str, tuple[Tensor, Tensor]]:
    """The prompts that no training sees: those of the results, and those that steps and rates are chosen on."""
    return {"test": problems(tested, seeded(10**6)), "choice": problems(-(-tested // 4), seeded(10**6 + 1))}


def run_one(args: argparse.Namespace, variant: str, seed: int) -> None:
    """Trains one model, and writes what it predicts of the held-out prompts."""
    torch.manual_seed(seed)
    model, data = Regressor(decoder_config(variant, args.position)), seeded(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    warmup = min(200, args.updates // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: min(1.0, (t + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * t / args.updates)),
    )
    for _ in progress_bar(range(args.updates), desc=f"{variant}, seed {seed}", unit="update"):
        x, y = problems(BATCH, data)  # the same of a seed for every variant
        optimizer.zero_grad()
        F.mse_loss(model(x, y), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = {name: torch.cat([model(*part) for part in zip(*(t.split(256) for t in given), strict=True)]).numpy()
                 for name, given in held_out(args.tested).items()}  # fmt: skip
    np.savez(args.output / variant / f"seed{seed}" / "predictions.npz", **found)


def prefix_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, N, D), y (B, N) -> of the examples before each the sums of x x^T (B, N, D, D) and x y (B, N, D)."""
    x, y = x.double(), y.double()
    outer, product = x[..., None] * x[..., None, :], x * y[..., None]
    before = [F.pad(sums[:, :-1], (*[0, 0] * (sums.dim() - 2), 1, 0)) for sums in (outer.cumsum(1), product.cumsum(1))]
    return before[0], before[1]


def predicted(x: Tensor, w: Tensor) -> Tensor:
    """x, w (B, N, D) -> (B, N)."""
    return (x.double() * w).sum(-1)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The mean of y given the examples before, (B, N): no prediction has a smaller error."""
    gram, product = prefix_sums(x, y)
    w = torch.linalg.solve(gram + NOISE**2 * torch.eye(DIMENSION), product[..., None])
    return predicted(x, w.squeeze(-1))


def descents(x: Tensor, y: Tensor, rate: float, beta: float) -> Iterator[tuple[int, Tensor]]:
    """Gradient descent on the squared error of the examples before, from 0, with momentum ``beta`` (heavy ball):
    (steps, predictions (B, N)) for each number of :data:`STEPS`.

    ``rate`` is in units of 1 / the largest eigenvalue of the sum of x x^T, of each prompt and number of examples: below
    2 (2 + 2 beta with momentum) it converges.
    """
    gram, product = prefix_sums(x, y)
    scale = rate / torch.linalg.matrix_norm(gram, 2).clamp(min=EXACT)[..., None]
    w = velocity = torch.zeros_like(product)
    for step in range(1, STEPS[-1] + 1):
        gradient = (gram @ w[..., None]).squeeze(-1) - product
        velocity = beta * velocity - scale * gradient
        w = w + velocity
        if step in STEPS:
            yield step, predicted(x, w)


def newtons(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Newton's iteration for the inverse of the sum of x x^T (arXiv 2310.17086): (steps, predictions (B, N))."""
    gram, product = prefix_sums(x, y)
    inverse = gram / torch.linalg.matrix_norm(gram, 2).clamp(min=EXACT)[..., None, None] ** 2
    for step in range(1, 13):
        inverse = 2 * inverse - inverse @ gram @ inverse
        yield step, predicted(x, (inverse @ product[..., None]).squeeze(-1))


def methods(x: Tensor, y: Tensor) -> dict[str, dict[str, Tensor]]:
    """By method, the predictions (B, N) of each choice of steps and rates, by a name of the choice."""
    found: dict[str, dict[str, Tensor]] = {
        "ridge": {"exact": ridge(x, y)},
        "Newton": {f"{step} steps": p for step, p in newtons(x, y)},
    }
    for name, betas in (("GD", (0.0,)), ("GD with momentum", BETAS)):
        found[name] = {
            f"{step} steps, rate {rate}" + (f", momentum {beta}" if beta else ""): p
            for rate, beta in itertools.product(RATES, betas)
            for step, p in descents(x, y, rate, beta)
        }
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of predictions (B, N), where there is an example before, as a share of the variance of y
    without noise.
    """
    return float(torch.nan_to_num((a.double() - b)[:, 1:].square(), posinf=1e12, nan=1e12).mean() / DIMENSION)


def nearest(
    predictions: dict[str, Tensor], known: dict[str, dict[str, dict[str, Tensor]]]
) -> dict[str, dict[str, Any]]:
    """By method: the choice that is nearest to a model's predictions on the prompts for choosing, and its distance on
    the others.
    """
    found = {}
    for method, some in known["choice"].items():
        choice = min(some, key=lambda name: distance(predictions["choice"], some[name]))
        found[method] = {"choice": choice, "distance": distance(predictions["test"], known["test"][method][choice])}
    return found


def preference(found: dict[str, dict[str, Any]]) -> float:
    """log(distance to GD with momentum / distance to GD): below 0, momentum is nearer."""
    momentum, plain = (max(EXACT, found[name]["distance"]) for name in ("GD with momentum", "GD"))
    return math.log(momentum / plain)


def measure(args: argparse.Namespace, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Errors by number of examples, and distances to the methods, of every model."""
    prompts = held_out(args.tested)
    known = {part: methods(*given) for part, given in prompts.items()}
    y = prompts["test"][1].double()
    variants: dict[str, Any] = {}
    for name, seed in itertools.product(names, seeds):
        with np.load(args.output / name / f"seed{seed}" / "predictions.npz") as file:
            predictions = {part: torch.from_numpy(file[part]) for part in known}
        errors = (predictions["test"] - y).square().mean(0) - NOISE**2
        found = nearest(predictions, known)
        record = {"excess_error": errors.tolist(), "nearest": found, "preference": preference(found)}
        variants.setdefault(name, {})[str(seed)] = record
    exact = {method: (some["exact"] - y).square().mean(0) - NOISE**2 for method, some in known["test"].items()
             if "exact" in some}  # fmt: skip
    ideal = {part: some["ridge"]["exact"] for part, some in known.items()}
    return {
        "variants": variants,
        "methods": {method: errors.tolist() for method, errors in exact.items()},
        "preference_of_ridge": preference(nearest(ideal, known)),  # of a learner that does neither
    }


def over_seeds(records: dict[str, Any], value: Callable[[Any], float], baseline: dict[str, Any] | None = None) -> str:
    """The mean over seeds, less that of a baseline seed by seed if given, with Student's 95% interval."""
    values = [value(record) - (value(baseline[seed]) if baseline else 0.0) for seed, record in records.items()]
    if len(values) < 2:
        return f"{values[0]:.3f}"
    found: Interval = t_interval(values)
    return f"{found.estimate:.3f} ({found.low:.3f} to {found.high:.3f})"


def tables(results: dict[str, Any]) -> list[Table]:
    """What is printed."""
    vanilla, rows, near = results["variants"].get("vanilla"), [], []
    for name, records in results["variants"].items():
        errors = [over_seeds(records, lambda r, n=n: r["excess_error"][n]) for n in (4, 8, EXAMPLES - 1)]
        other = vanilla if name != "vanilla" else None
        change = over_seeds(records, lambda r: float(np.mean(r["excess_error"][1:])), other) if other else ""
        rows.append([name, *errors, change])
        distances = [over_seeds(records, lambda r, m=m: r["nearest"][m]["distance"])
                     for m in ("ridge", "Newton", "GD", "GD with momentum")]  # fmt: skip
        change = over_seeds(records, lambda r: r["preference"], other) if other else ""
        near.append([name, *distances, change])
    near.append(["ridge", *[""] * 4, f"{results['preference_of_ridge']:.3f}, not less vanilla's"])
    rows.append(["ridge", *(f"{results['methods']['ridge'][n]:.3f}" for n in (4, 8, EXAMPLES - 1)), ""])
    columns = ["", "after 4", "after 8", f"after {EXAMPLES - 1}", "mean, less vanilla's"]
    first = Table(columns, rows, "Squared error beyond the noise's, by examples before (95% interval over seeds)")
    columns = ["", "ridge", "Newton", "GD", "GD with momentum", "log(momentum / GD), less vanilla's"]
    return [first, Table(columns, near, "Distance of predictions to the nearest of each method, share of y's variance")]


def error_panel(results: dict[str, Any]) -> Panel:
    """Error by number of examples: the mean over seeds of each variant, and ridge's."""

    def panel(axes: Any) -> None:
        axes.set(xlabel="examples in the prompt", ylabel="squared error beyond the noise's", yscale="log")
        curves = {name: np.mean([r["excess_error"] for r in records.values()], 0)
                  for name, records in results["variants"].items()}  # fmt: skip
        for i, (name, errors) in enumerate({**curves, **results["methods"]}.items()):
            look = dict(marker=MARKERS[i % len(MARKERS)], markersize=3, **line_style(i))
            axes.plot(range(1, EXAMPLES), np.maximum(errors[1:], 1e-4), label=name, **look)

    return panel


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0; 1 where a run failed; a UserError becomes one line on stderr and status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/regression"), help="default: %(default)s")
    add("--variants", default="all", help="comma-separated, or all: " + ", ".join(VARIANTS))
    add("--seeds", default="1,2,3,4,5", help="default: %(default)s")
    add("--position", default="rotary", choices=["rotary", "none"], help="default: %(default)s")
    add("--updates", type=int, default=5000, help="of 64 prompts each (default: %(default)s)")
    add("--tested", type=int, default=TESTED, help="prompts that the results are of (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads per run (default: %(default)s)")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = list(VARIANTS) if args.variants == "all" else choices(args.variants, "--variants", list(VARIANTS))
    seeds = integers(args.seeds, "--seeds", 1, "1,2,3")
    for flag in ("updates", "tested", "jobs", "threads"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    args.output = args.output.resolve()
    if args.one:
        run_one(args, args.one[0], int(args.one[1]))
        return 0
    config = open_config(
        args.output, {"position": args.position, "updates": args.updates, "tested": args.tested}, "a study"
    )
    own = [sys.executable, str(Path(__file__).resolve()), "--output", str(args.output), "--position", args.position]
    own += ["--updates", str(args.updates), "--tested", str(args.tested)]
    jobs = [Job("train", [*own, "--one", name, str(seed)], args.output / name / f"seed{seed}", args.threads)
            for seed in seeds for name in names]  # fmt: skip
    try:
        run_all(jobs, args.jobs, "training")
    except JobError as error:
        print(f"error: {error}\n\nRun the same command again to go on from here.", file=sys.stderr)
        return 1
    results = measure(args, names, seeds)
    write_json(args.output / "results.json", {**config, **results})
    save_png(draw(error_panel(results), size=(7.0, 4.4)), args.output / "errors.png")
    print("\n\n".join(table.text() for table in tables(results)))
    print(f"\n{args.output}/results.json, errors.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

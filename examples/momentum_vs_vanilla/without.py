"""What do trained models rely on their filters for? Evaluates the runs of a sweep with the filters taken out.

    python examples/momentum_vs_vanilla/without.py DATA runs/study/results_1.02e+06.json --variants ema,fir3

Takes the runs whose test perplexity the results have and whose checkpoints are still there. The new perplexities go
into without_TOKENS.json beside the results; what that has is not evaluated again. Prints Markdown.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import sweep

from momentum_lm.cli.options import Parser
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import write_json
from momentum_lm.results.records import read_results
from momentum_lm.studies.flags import choices
from momentum_lm.untrusted import parse_json

from jobs import Job, JobError, perplexity_command, run_all  # isort: skip (sweep has put scripts/ on the path)

Key = tuple[str, str, float, int, str]  # form, variant, learning rate, seed, what was taken out


def read(stored: Path, length: int) -> dict[Key, float]:
    """Perplexities at a context length that are there already. Raises UserError for another file."""
    if not stored.exists():
        return {}
    try:
        content = parse_json(stored.read_bytes())
        if content["context_length"] != length:
            raise UserError(f"{stored} is of context {content['context_length']}, not {length}: move it away")
        rows = content["runs"]
        return {(str(f), str(v), float(lr), int(seed), str(out)): float(ppl) for f, v, lr, seed, out, ppl in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{stored} is damaged, or not ours ({error}): move it away") from error


def table(whole: dict[sweep.Run, float], found: dict[Key, float]) -> str:
    """Markdown: perplexity without the filters of some layers against that with all of them, over seeds."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for (form, variant, lr, seed, removed), perplexity in found.items():
        gap = math.log(perplexity / whole[sweep.Run(form, variant, lr, seed)])
        groups.setdefault((form, variant, removed), []).append(gap)
    lines = [
        "| form | variant | without the filters of | seeds | perplexity | 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    for (form, variant, removed), gaps in groups.items():
        where = "all layers" if removed == "all" else f"layer {removed}"
        lines.append(f"| {' | '.join([form, variant, where, str(len(gaps)), *sweep.change(gaps)])} |")
    return "\n".join(lines)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path, help="results_TOKENS.json in a sweep's --output")
    parser.add_argument("--variants", default="ema,fir3")
    parser.add_argument("--form", default="gpt,llama")
    parser.add_argument("--layers", default="all,0,1,2", help="each is taken out by itself; all: all at once")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations at a time")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be at least 1")
    if not args.results.exists():
        raise UserError(f"{args.results} does not exist: give results_TOKENS.json of a sweep's --output")
    label = args.results.stem.removeprefix("results_")
    forms = choices(args.form, "--form", list(sweep.FORMS))
    variants = choices(args.variants, "--variants", list(sweep.VARIANTS))
    rows = [row for row in sweep.results(args.results, {}).values() if row["split"] == "test"]
    length = max((row["context_length"] for row in rows), default=0)
    whole = {
        sweep.Run(*(row[name] for name in sweep.Run._fields)): row["perplexity"]
        for row in rows
        if row["context_length"] == length and row["form"] in forms and row["variant"] in variants
    }
    for form, variant in sorted({(run.form, run.variant) for run in whole}):
        rates = sorted({run.lr for run in whole if (run.form, run.variant) == (form, variant)})
        if len(rates) > 1:
            raise UserError(f"{variant} ({form}) has test results at the learning rates {rates}: keep those of one")
    texts = {row["data_sha256"] for row in rows if "data_sha256" in row}
    if texts - {sweep.text_digest(args.data, "test")}:
        raise UserError(f"{args.results} is of another test text than that of {args.data}: give the sweep's DATA")
    stored = args.results.with_name(f"without_{label}.json")
    found = read(stored, length)
    jobs: dict[Key, Job] = {}
    for run, removed in itertools.product(whole, args.layers.split(",")):
        folder = run.folder(args.results.parent / label)
        if (*run, removed) not in found and (folder / "checkpoint_last.pt").exists():
            output = folder / f"without_{removed}"
            command = perplexity_command(args.data.resolve(), folder, "test", str(length), output)
            command += ["--without-momentum", removed, *sweep.user_dir(None, run.variant)]
            jobs[*run, removed] = Job(output.name, command, folder, 1)
    try:
        run_all(list(jobs.values()), args.jobs, "evaluating")
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for key, job in jobs.items():
        found[key] = read_results(job.folder / job.name)["runs"][0]["perplexity"]
    wanted = {key: found[key] for key in sorted(found) if sweep.Run(*key[:4]) in whole}
    if not wanted:
        raise UserError(f"{args.results}: no run of {args.variants} ({args.form}) on test has its checkpoint still")
    columns = [*sweep.Run._fields, "removed", "perplexity"]
    write_json(stored, {"columns": columns, "context_length": length, "runs": [[*k, found[k]] for k in sorted(found)]})
    print(table(whole, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())

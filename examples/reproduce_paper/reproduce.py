"""Every table of "Why Can GPT Learn In-Context?" (arXiv 2212.10559), with the paper's models, seeds and learning rates,
beside its numbers.

    python examples/reproduce_paper/reproduce.py --models models                      # Tables 1 to 5
    python examples/reproduce_paper/reproduce.py --vanilla A.pt --momentum B.pt --text data/bin     # Tables 6 and 7

Run it again after an interruption: what is finished is kept. Ends with comparison.json, report.html, and how many of
the published numbers lie in our 95% intervals over examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momentum_lm.cli.options import Parser
from momentum_lm.cpu import usable_cpus
from momentum_lm.errors import UserError, main_guard
from momentum_lm.files import write_json
from momentum_lm.report import published
from momentum_lm.report.finetuning_verdicts import number
from momentum_lm.report.html import Code, Folded, Paragraph, Part, write_page
from momentum_lm.report.icl_vs_finetuning import published_quantity
from momentum_lm.report.tables import Table
from momentum_lm.results.records import read_results
from momentum_lm.studies.classification_summary import cells, summarise_cell
from momentum_lm.studies.finetuning_summary import settings
from momentum_lm.studies.flags import choices, integers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from jobs import Job, JobError, last_bar, open_config, run_jobs, tool

FOLDERS = {"1.3B": "en_dense_lm_1_3b", "2.7B": "en_dense_lm_2_7b"}
ADDRESS = "https://dl.fbaipublicfiles.com/fairseq"
LIKE_IT = 0.0005  # half of what the paper's last digit is worth
Row = dict[str, Any]  # table, model, dataset, quantity, ours (number, interval), paper


def download_lines(models: Path, name: str) -> str:
    """How to get one of the paper's models."""
    folder = FOLDERS[name]
    files = " ".join(f"-O {ADDRESS}/gpt2_bpe/{file}" for file in ("encoder.json", "vocab.bpe"))
    return f"  curl {ADDRESS}/models/lm/{folder}.tar.gz | tar xz -C {models}\n  (cd {models}/{folder} && curl {files})"


def analysis(args: argparse.Namespace, model: str, dataset: str) -> Job:
    """Tables 1 to 5 of one model and data set: zero-shot, in context, finetuned."""
    seed, rate = published.seed_and_rate(model, dataset)
    folder = args.output / FOLDERS[model] / dataset
    words = [
        "--task",
        "icl_finetune_analysis",
        "--path",
        args.models / FOLDERS[model],
        "--datasets",
        dataset,
        "--protocol",
        "paper",
    ]
    words += [
        "--shots",
        published.SHOTS[dataset],
        "--seeds",
        seed,
        "--finetune-lr",
        rate,
        "--controls",
        "random",
        "--results-dir",
        folder,
    ]
    return Job("evaluate", [tool("fairseq-eval"), *map(str, words), *shared_flags(args)], folder, usable_cpus())


def momentum_jobs(args: argparse.Namespace) -> dict[str, Job]:
    """Tables 6 and 7: perplexity and in-context accuracy of a vanilla and a momentum model."""
    jobs = {}
    for name in ("vanilla", "momentum"):
        path = getattr(args, name)
        folder = args.output / name
        words: list[Any] = [
            "--task",
            "icl_classification",
            "--path",
            path,
            "--datasets",
            ",".join(args.momentum_datasets),
            "--shots",
            32,
        ]
        words += ["--seeds", "1,2,3", "--results-dir", folder / "icl"]
        jobs[f"{name} icl"] = Job(
            "evaluate", [tool("fairseq-eval"), *map(str, words), *shared_flags(args)], folder / "icl", usable_cpus()
        )
        if args.text:
            words = [
                "--task",
                "lm_perplexity",
                args.text,
                "--path",
                path,
                "--split",
                "valid",
                "--results-dir",
                folder / "perplexity",
            ]
            words += [
                "--context-lengths",
                ",".join(map(str, args.lengths)),
                "--device",
                args.device,
                "--dtype",
                args.dtype,
            ]
            jobs[f"{name} perplexity"] = Job(
                "evaluate", [tool("fairseq-eval"), *map(str, words)], folder / "perplexity", usable_cpus()
            )
    return jobs


def shared_flags(args: argparse.Namespace) -> list[str]:
    """Flags that every evaluation on labelled data gets."""
    words = ["--device", args.device, "--dtype", args.dtype]
    words += [] if args.limit is None else ["--limit", str(args.limit)]
    return words + ([] if args.data_dir is None else ["--data-dir", str(args.data_dir)])


def analysis_rows(args: argparse.Namespace, model: str, dataset: str) -> list[Row]:
    runs = read_results(args.output / FOLDERS[model] / dataset)["runs"]
    rows = []
    for chosen in settings(runs).values():
        for quantity in published.QUANTITIES:
            title, ours = published_quantity(chosen, quantity)
            percent = quantity in published.IN_PERCENT
            paper = published.published(quantity, model, dataset) / (100 if percent else 1)
            text = f"{100 * paper:.1f}%" if percent else f"{paper:.3f}"
            rows.append(
                {
                    "model": model,
                    "dataset": dataset,
                    "quantity": title,
                    "ours": number(ours, percent) or "undefined",
                    "paper": text,
                    "inside": None
                    if ours["ci95"] is None
                    else ours["ci95"][0] - LIKE_IT <= paper <= ours["ci95"][1] + LIKE_IT,
                    "mean": ours["mean"],
                    "ci95": ours["ci95"],
                    "published": paper,
                    "num_examples": chosen[0]["num_examples"],
                }
            )
    return rows


def momentum_rows(args: argparse.Namespace) -> list[Row]:
    """Momentum minus vanilla, ours and the paper's: other text and other tokens, so that only the differences can be
    compared.
    """
    rows = []
    if args.text:
        found = {name: read_results(args.output / name / "perplexity")["runs"] for name in ("vanilla", "momentum")}
        for length in args.lengths:
            ours = [next(run["perplexity"] for run in found[name] if run["context_length"] == length) for name in found]
            rows.append(_pair(f"perplexity, context {length}", ours, published.PERPLEXITY.get(length), "{:.2f}"))
    found = {name: read_results(args.output / name / "icl")["runs"] for name in ("vanilla", "momentum")}
    for dataset in args.momentum_datasets:
        accuracies = []
        for runs in found.values():
            (chosen,) = (some for (of, _, _), some in cells(runs).items() if of == dataset)
            accuracies.append(100 * summarise_cell(chosen)["mean"])
        rows.append(_pair(f"accuracy, {dataset}, %", accuracies, published.MOMENTUM_ICL.get(dataset), "{:.1f}"))
    return rows


def _pair(quantity: str, ours: Sequence[float], paper: Sequence[float] | None, form: str) -> Row:
    here, there = (None if pair is None else pair[1] - pair[0] for pair in (ours, paper))
    return {
        "quantity": quantity,
        "vanilla": ours[0],
        "momentum": ours[1],
        "difference": here,
        "published": None if paper is None else list(paper),
        "texts": [form.format(ours[0]), form.format(ours[1]), f"{here:+.2f}", "" if there is None else f"{there:+.2f}"],
    }


def report(args: argparse.Namespace, rows: Sequence[Row], pairs: Sequence[Row], commands: Sequence[str]) -> str:
    """Writes comparison.json and report.html; returns what is printed."""
    texts, parts = [], {}
    if rows:
        marks = {True: "yes", False: "NO", None: ""}
        cells_ = [[r["model"], r["dataset"], r["quantity"], r["ours"], r["paper"], marks[r["inside"]]] for r in rows]
        table = Table(["model", "dataset", "", "here (95% over examples)", "paper", "inside?"], cells_, "Tables 1 to 5")
        known = [r for r in rows if r["inside"] is not None]
        inside = sum(r["inside"] for r in known)
        sentence = f"{inside} of {len(known)} published numbers lie in our 95% intervals over examples."
        if args.limit is not None:
            sentence += f" Only {args.limit} examples a data set were evaluated."
        texts += [table.text(), sentence]
        parts["Tables 1 to 5"] = [Paragraph(sentence), table]
    if pairs:
        table = Table(
            ["", "vanilla", "momentum", "difference", "the paper's difference"],
            [[p["quantity"], *p["texts"]] for p in pairs],
        )
        note = (
            "Another text, other tokens and another tokenizer than the paper's, which names no corpus: only the signs "
            "can be compared."
        )
        texts += [table.text(), note]
        parts["Tables 6 and 7"] = [table, Paragraph(note)]
    code: list[Part] = [Folded("Every command that was run", [Code("\n\n".join(commands))])]
    write_page(args.output / "report.html", "arXiv 2212.10559, reproduced", {**parts, "How to run it again": code})
    write_json(args.output / "comparison.json", {"tables_1_to_5": list(rows), "tables_6_and_7": list(pairs)})
    return "\n\n".join(texts)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with " + " and ".join(FOLDERS.values()) + ", as they come")
    parser.add_argument("--sizes", default="1.3B,2.7B", help="of the paper's models (default: %(default)s)")
    parser.add_argument("--datasets", default=",".join(published.DATASETS), help="default: %(default)s")
    parser.add_argument("--vanilla", metavar="CKPT", help="a gpt_lm model, for Tables 6 and 7")
    parser.add_argument("--momentum", metavar="CKPT", help="a momentum_lm model, trained on the same tokens")
    parser.add_argument("--text", type=Path, metavar="DATA", help="binarised text for Table 6, with a valid split")
    parser.add_argument("--lengths", default="256,512,1024", help="context lengths of Table 6 (default: %(default)s)")
    parser.add_argument(
        "--momentum-datasets", default=",".join(published.MOMENTUM_ICL), help="of Table 7 (default: %(default)s)"
    )
    parser.add_argument("--data-dir", type=Path, help="labelled data, as for fairseq-eval (default: the hub)")
    parser.add_argument("--limit", type=int, help="evaluate at most so many examples a data set")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="fp16", choices=["fp32", "bf16", "fp16"], help="the paper's: fp16 (default)")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="default: %(default)s")
    args = parser.parse_args(argv)
    sizes = choices(args.sizes, "--sizes", list(FOLDERS))
    datasets = choices(args.datasets, "--datasets", published.DATASETS)
    args.lengths = integers(args.lengths, "--lengths", 1, "256,512,1024")
    args.momentum_datasets = args.momentum_datasets.split(",")
    if bool(args.vanilla) != bool(args.momentum):
        raise UserError("--vanilla and --momentum go together: Tables 6 and 7 compare the two")
    if args.models is None and not (args.vanilla and args.momentum):
        raise UserError("give --models for Tables 1 to 5, or --vanilla and --momentum for Tables 6 and 7, or all three")
    if args.models is not None:
        missing = [size for size in sizes if not (args.models / FOLDERS[size]).is_dir()]
        if missing:
            lines = "\n".join(download_lines(args.models, size) for size in missing)
            raise UserError(
                f"{args.models} lacks {', '.join(FOLDERS[size] for size in missing)}; this fetches what is "
                f"missing:\n{lines}"
            )
    names = ("models", "data_dir", "limit", "dtype", "vanilla", "momentum", "text")
    open_config(
        args.output, {name: None if (v := getattr(args, name)) is None else str(v) for name in names}, "a reproduction"
    )
    wanted = [(size, dataset) for size in sizes for dataset in datasets] if args.models is not None else []
    jobs = {f"{size} {dataset}": analysis(args, size, dataset) for size, dataset in wanted}
    jobs |= momentum_jobs(args) if args.vanilla else {}
    try:
        for count, (name, job) in enumerate(jobs.items(), start=1):
            print(f"[{count}/{len(jobs)}] {name}", flush=True)
            run_jobs([job], 1, last_bar(job))
    except JobError as error:
        print(f"error: {error}\n\nRun the same command again to go on from here.", file=sys.stderr)
        return 1
    rows = [row for size, dataset in wanted for row in analysis_rows(args, size, dataset)]
    pairs = momentum_rows(args) if args.vanilla else []
    print(
        f"\n{report(args, rows, pairs, [' '.join(job.command) for job in jobs.values()])}\n\n{args.output}/report.html"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

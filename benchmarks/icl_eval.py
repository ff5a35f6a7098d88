"""Scoring labels in context, side by side: ours, full prompts one at a time with plain transformers, and
lm-evaluation-harness.

    python benchmarks/icl_eval.py --model DIR --data-dir DIR [--gguf-file FILE] [--lm-eval-python VENV/bin/python]
    [--json OUT.json]

All score the same prompts with the same weights in fp32 on all cores, one after the other, each in a process of its
own, ours first and last. Loading the model and a warm-up are not timed; making tokens of the prompts is.
lm-evaluation-harness (`lm-eval`, its `hf` backend) is no dependency of this package: it may lie in another environment,
whose Python is named. Of its batch sizes the one that is fastest on a few examples scores all of them. Where other work
shares the machine, CPU time, summed over threads, is what to read.

The status is 1 where accuracies differ, or a log-probability by more than 1e-3 (by more than 1e-4 from plain
transformers').
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SEPARATOR = "\n\n"
TOLERANCE = {"plain": 1e-4, "lm_eval": 1e-3}  # nats; those of lm-evaluation-harness are of batches padded otherwise


class Timer:
    """Wall and CPU seconds (of all threads) of a ``with`` block."""

    def __enter__(self):
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *unused):
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


def texts(sample: dict) -> list[tuple[str, list[str]]]:
    """(whole prompt, continuations) of each example; choices that have inputs of their own are not for
    this benchmark.
    """
    before = [d["inputs"][0] + d["continuations"][d["gold"]] for d in sample["demonstrations"]]
    return [(SEPARATOR.join([*before, e["inputs"][0]]), e["continuations"]) for e in sample["examples"]]


def ours(sample: dict, args: argparse.Namespace) -> dict:
    """Through the functions that `fairseq-eval --task icl_classification` calls."""
    from momentum_lm.cpu import keep_memory
    from momentum_lm.icl import engine, prompts
    from momentum_lm.icl.datasets.loading import Example
    from momentum_lm.lm.huggingface import load_huggingface

    lm = load_huggingface(args.model, args.gguf_file)
    keep_memory()
    form = prompts.PromptFormat(lm.bos, SEPARATOR)
    demonstrations, examples = (
        [Example(e["index"], tuple(e["inputs"]), tuple(e["continuations"]), e["gold"]) for e in sample[name]]
        for name in ("demonstrations", "examples")
    )

    def score(some: list) -> list[list[float]]:
        queries = prompts.build(lm, form, demonstrations, some).queries
        batches = engine.plan(queries, args.batch_tokens or engine.query_budget(lm, queries))
        answers = {i: found for _, part in engine.score_batches(lm, queries, batches) for i, found in part.items()}
        return [[answer.log_prob for answer in answers[i]] for i in range(len(some))]

    score(examples[:4])
    timers = []
    for _ in range(args.repeats):
        with Timer() as timer:
            scores = score(examples)
        timers.append(timer)
    rows = [
        {
            "name": "ours",
            **{kind: [getattr(timer, kind) / len(examples) for timer in timers] for kind in ("wall", "cpu")},
        }
    ]
    return {"rows": rows, "scores": scores}


def plain(sample: dict, args: argparse.Namespace) -> dict:
    """With no code of ours: every prompt as a whole, alone, for each of its continuations. Independent of the tokens'
    reuse above.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **given)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **given).eval()

    @torch.inference_mode()
    def score(prompt: str, continuation: str) -> float:
        start = len(tokenizer(prompt).input_ids)
        tokens = torch.tensor(tokenizer(prompt + continuation).input_ids)
        log_probs = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)
        return float(sum(log_probs[i - 1, tokens[i]] for i in range(start, len(tokens))))

    questions = texts(sample)
    for prompt, continuations in questions[:2]:
        score(prompt, continuations[0])
    scores, timers = [], []
    for prompt, continuations in questions[: args.plain_examples]:
        scores.append([])
        for continuation in continuations:
            with Timer() as timer:
                scores[-1].append(score(prompt, continuation))
            timers.append(timer)
    choices = len(timers) / len(scores)
    wall, cpu = (sum(getattr(timer, kind) for timer in timers) / len(timers) for kind in ("wall", "cpu"))
    rows = [
        {"name": "plain transformers, a prompt per choice", "wall": [wall * choices], "cpu": [cpu * choices]},
        {"name": "plain transformers, a prompt per example", "wall": [wall], "cpu": [cpu]},
    ]
    return {"rows": rows, "scores": scores}


def lm_eval(sample: dict, args: argparse.Namespace) -> dict:
    """Runs in the environment of lm-eval, which need not have this package."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=args.model, gguf_file=args.gguf_file, device="cpu", dtype="float32", batch_size=1)
    questions = texts(sample)

    def score(some: list, batch_size: int) -> tuple[list[list[float]], Timer]:
        lm.batch_size_per_gpu = batch_size
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(prompt, continuation), idx=i)
            for prompt, continuations in some
            for i, continuation in enumerate(continuations)
        ]
        with Timer() as timer:
            found = iter(lm.loglikelihood(requests, disable_tqdm=True))
        return [[next(found)[0] for _ in continuations] for _, continuations in some], timer

    score(questions[:2], 1)
    some = questions[: args.search_examples]
    tried = {size: score(some, size)[1].wall / len(some) for size in args.batch_sizes}
    best = min(tried, key=lambda size: tried[size])
    scores, timer = score(questions, best)
    count = len(questions)
    row = {"name": f"lm-eval, hf, batch size {best}", "wall": [timer.wall / count], "cpu": [timer.cpu / count]}
    return {"rows": [row], "scores": scores, "batch_sizes": tried}


def accuracy(scores: list[list[float]], examples: list[dict]) -> float:
    return sum(row.index(max(row)) == e["gold"] for row, e in zip(scores, examples, strict=False)) / len(scores)


def compare(results: dict[str, dict], examples: list[dict]) -> tuple[str, list[str]]:
    """The table, and what differs too much; adds ``ratio`` and ``cpu_ratio``, to the medians of ours, to each row."""
    scored, first = results["ours"]["scores"], results["ours"]["rows"][0]
    lines = [
        f"{'':42}{'s/example':>10}{'/ ours':>8}{'CPU s':>8}{'/ ours':>8}{'accuracy':>10}{'ours':>8}"
        f"{'largest difference':>20}"
    ]
    failures = []
    for part, result in results.items():
        count = len(result["scores"])  # the first ones of ours
        theirs, mine = accuracy(result["scores"], examples), accuracy(scored[:count], examples)
        pairs = [pair for x, y in zip(result["scores"], scored, strict=False) for pair in zip(x, y, strict=True)]
        worst = max(
            (abs(a - b) for a, b in pairs), key=lambda difference: (difference != difference, difference)
        )  # NaN is the worst
        for row in result["rows"]:
            wall, cpu = (statistics.median(row[kind]) for kind in ("wall", "cpu"))
            row["ratio"], row["cpu_ratio"] = (
                wall / statistics.median(first["wall"]),
                cpu / statistics.median(first["cpu"]),
            )
            lines.append(
                f"{row['name']:42}{wall:10.3f}{row['ratio']:7.1f}x{cpu:8.3f}{row['cpu_ratio']:7.1f}x"
                f"{100 * theirs:9.1f}%{100 * mine:7.1f}%{worst:20.1e}"
                + (f"  (first {count})" if count < len(examples) else "")
            )
        if theirs != mine:
            failures.append(f"{part}: the accuracies differ")
        if not worst <= TOLERANCE.get(part, 0):
            failures.append(f"{part}: a log-probability differs by {worst:.1e}")
    return "\n".join(lines), failures


def questions_of(args: argparse.Namespace) -> dict:
    """Demonstrations and evaluated examples, as `fairseq-eval` would draw them, for all to read."""
    import dataclasses

    from momentum_lm.icl.datasets.loading import load_dataset
    from momentum_lm.icl.demonstrations import evaluation_subset, select

    data = load_dataset(args.dataset, args.data_dir, args.template)
    drawn = {
        "demonstrations": select(data.train, args.shots, args.seed, "balanced", data.spec.num_choices),
        "examples": evaluation_subset(data.evaluation, args.examples),
    }
    if any(len(example.inputs) > 1 for example in drawn["examples"]):
        raise SystemExit(
            f"--dataset {args.dataset}: its choices have inputs of their own; take one whose choices share theirs, "
            "such as mr"
        )
    return {name: [dataclasses.asdict(example) for example in examples] for name, examples in drawn.items()}


def run(part: str, python: str, file: str) -> dict:
    """A part in a process of its own."""
    print(f"{part} ... (load average {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
    command = [python, __file__, *sys.argv[1:], "--part", part, "--sample", file]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model of transformers")
    parser.add_argument("--gguf-file", help="its file in that folder")
    parser.add_argument("--data-dir", required=True, help="with NAME/train.jsonl and NAME/validation.jsonl")
    parser.add_argument("--dataset", default="mr")
    parser.add_argument("--template", default="code")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1, help="of the demonstrations")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--plain-examples", type=int, default=20, help="how many are scored one at a time")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of ours, before the others and after; the median counts"
    )
    parser.add_argument("--batch-tokens", type=int, help="of ours (default: by the memory there is)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--lm-eval-python", metavar="PYTHON", help="of an environment with lm-eval (default: it is left out)"
    )
    parser.add_argument(
        "--batch-sizes",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1, 2, 4, 8, 16],
        help="of lm-eval",
    )
    parser.add_argument("--search-examples", type=int, default=16, help="on which its best batch size is found")
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--part", choices=["ours", "plain", "lm_eval"], help=argparse.SUPPRESS)
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        import torch

        torch.set_num_threads(args.threads)
        with open(args.sample) as file:
            print(json.dumps(globals()[args.part](json.load(file), args)))
        return 0

    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    sample = questions_of(args)
    examples = sample["examples"]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(sample, file)
        file.flush()
        results = {part: run(part, sys.executable, file.name) for part in ("ours", "plain")}
        if args.lm_eval_python:
            results["lm_eval"] = run("lm_eval", args.lm_eval_python, file.name)
        row, again = results["ours"]["rows"][0], run("ours", sys.executable, file.name)["rows"][0]
    for kind in ("wall", "cpu"):
        row[kind] += again[kind]

    print(f"{args.dataset}, {args.shots} shots, {len(examples)} examples, fp32, {args.threads} threads")
    table, failures = compare(results, examples)
    print(table)
    print(
        f"ours: median of {len(row['wall'])} runs, before and after the others, {min(row['wall']):.3f} to "
        f"{max(row['wall']):.3f} s"
    )
    if args.lm_eval_python:
        tried = ", ".join(f"{size}: {seconds:.2f}" for size, seconds in results["lm_eval"]["batch_sizes"].items())
        print(f"lm-eval: s/example by batch size, on {min(args.search_examples, len(examples))} examples: {tried}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": results}, file, indent=1)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

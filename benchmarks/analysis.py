"""ICL against finetuning, side by side: ours, and the procedure of the paper's authors on the same model, prompts and
learning rate.

    python benchmarks/analysis.py --model DIR --data-dir DIR [--gguf-file FILE] [--json OUT.json]

The authors run a model once per setting, one whole prompt at a time with each of its labels, write what they look at as
JSON lines of floats, and read these for the metrics. That is done here with plain transformers and no code of ours but
for the prompts' token ids, and kindly: no subprocess per stage, no model loaded again, and no array of all examples'
products of queries, for which their code takes tens of gigabytes. Loading the model is timed for neither. Ours also
computes the corrected forms, which the other does not.

The status is 1 where predictions differ, or a metric of a layer by more than 1e-3.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOLERANCE = 1e-3
RANKED = 100  # examples of which attention to the demonstrations is ranked, as in the authors' code
METRICS = ("simaou", "simam", "simam_before", "kendall", "kendall_example", "recall_at_k", "recall_at_k_example")


def load(args: argparse.Namespace):
    """Model, dataset and settings, as `fairseq-eval --protocol paper` takes them."""
    from momentum_lm.icl.datasets.loading import load_dataset
    from momentum_lm.lm.huggingface import load_huggingface
    from momentum_lm.studies import classification
    from momentum_lm.studies.icl_vs_finetuning import Settings

    lm = load_huggingface(args.model, args.gguf_file)
    material = classification.Settings(shots=(args.shots,), seeds=(args.seed,), protocol="paper", limit=args.examples)
    return (
        lm,
        load_dataset(args.dataset, args.data_dir, args.template),
        Settings(material, rates=(args.learning_rate,), controls=()),
    )


def ours(args: argparse.Namespace, material: str) -> dict:
    from momentum_lm.studies.icl_vs_finetuning import analyse

    lm, data, settings = load(args)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        analyse(lm, [data], settings, folder, show_progress=False)
        seconds = time.perf_counter() - began
        run = json.loads(Path(folder, "results.json").read_text())["runs"][0]
        lines = [json.loads(line) for line in Path(folder, "predictions.jsonl").read_text().splitlines()]
        found = {"metrics": run["paper"], "rec2ftp": run["rec2ftp"], "predictions": by_setting(lines)}
        return {"seconds": seconds, "bytes": size(folder), **found}


def by_setting(lines: list[dict]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line in lines:
        found.setdefault(line["setting"], []).append(line["pred"])
    return found


def size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def prompts(args: argparse.Namespace) -> dict:
    """Token ids of all that the authors' procedure shows the model, and where the demonstrations' tokens stand."""
    from momentum_lm.icl.demonstrations import evaluation_subset, select
    from momentum_lm.icl.prompts import build, demonstration_text
    from momentum_lm.studies.traces import align

    lm, data, settings = load(args)
    form = settings.questions.form(lm)
    examples = evaluation_subset(data.evaluation, args.examples, protocol_paper=True)
    demonstrations = select(data.train, args.shots, args.seed, "random", data.spec.num_choices)
    built = {"in_context": build(lm, form, demonstrations, examples), "zero_shot": build(lm, form, [], examples)}
    material = {
        name: [[[list(r.tokens), len(r.context)] for r in query] for query in found.queries]
        for name, found in built.items()
    }
    lessons = lm.encode([demonstration_text(example) for example in demonstrations])
    aligned = align(material["in_context"][0][0][0], lessons, len(form.bos))
    if aligned is None:
        raise SystemExit("the demonstrations have other tokens in the prompt than alone; take another template")
    where = {"context": aligned.context.tolist(), "kept": [[span.start, span.stop] for span in aligned.kept]}
    return (
        material | where | {"lessons": lessons, "begin": list(form.bos), "gold": [example.gold for example in examples]}
    )


def authors(args: argparse.Namespace, material_file: str) -> dict:
    import torch
    import torch.nn.functional as F
    from transformers import AttentionInterface, AutoModelForCausalLM

    material = json.loads(Path(material_file).read_text())
    begin = len(material["begin"])
    seen: dict[str, list] = {"maps": []}

    def attention(module, query, key, value, mask, scaling=None, **unused):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        seen["maps"].append(scores[0, :, -1])
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(causal, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("one_row", attention)
    given = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="one_row", **given
    ).eval()
    model.requires_grad_(False)
    layers = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    heads = model.config.num_attention_heads
    scale = layers[0].q_proj.out_features // heads
    for layer in layers:
        layer.q_proj.register_forward_hook(lambda m, i, o: seen["queries"].append(o[0].detach() * scale**-0.5))
        layer.register_forward_hook(lambda m, i, o: seen["outputs"].append(o[0][0, -1]))

    def forward(tokens: list[int]) -> torch.Tensor:
        seen.update(maps=[], queries=[], outputs=[])
        return model(torch.tensor([tokens]), use_cache=False).logits[0]

    def record(setting: str, file) -> None:
        """One line an example; its floats are those of its first label's prompt."""
        for number, (query, gold) in enumerate(zip(material[setting], material["gold"], strict=True)):
            scores: list[float] = []
            kept: dict = {}
            for tokens, start in query:
                with torch.inference_mode():
                    log_probs = forward(tokens).log_softmax(-1)
                scores.append(
                    float(torch.stack([log_probs[i - 1, tokens[i]] for i in range(start, len(tokens))]).mean())
                )
                if not kept:
                    own = len(material["zero_shot"][number][0][0]) - begin
                    maps = torch.stack(seen["maps"])
                    kept = {
                        "attn_out": torch.stack(seen["outputs"]).tolist(),
                        "attn_q": torch.stack([q[-1] for q in seen["queries"]]).tolist(),
                        "attn_map": maps[:, :, -own:].tolist(),
                        "attn_map_context": maps[:, :, :-own].sum(1).tolist(),
                    }
            print(json.dumps({"gold": gold, "pred": int(np.argmax(scores)), "scores": scores, **kept}), file=file)

    def finetune(file) -> None:
        chosen = [p for name, p in model.named_parameters() if "k_proj" in name or "v_proj" in name]
        for parameter in chosen:
            parameter.requires_grad_(True)
        for lesson in material["lessons"]:
            tokens = [*material["begin"], *lesson]
            targets = torch.tensor(tokens[max(1, begin) :])
            loss = F.cross_entropy(forward(tokens)[max(1, begin) - 1 : -1], targets)
            print(json.dumps([q.tolist() for q in seen["queries"]]), file=file)
            loss.backward()
            with torch.no_grad():
                for parameter in chosen:
                    parameter -= args.learning_rate * parameter.grad
                    parameter.grad = None

    forward(material["zero_shot"][0][0][0])
    material["finetuned"] = material["zero_shot"]
    with tempfile.TemporaryDirectory() as folder:
        stages = ("zero_shot", "in_context", "training", "finetuned")
        files = {name: Path(folder, f"{name}.jsonl") for name in stages}
        began = time.perf_counter()
        for stage in stages:
            with files[stage].open("w") as file:
                if stage == "training":
                    finetune(file)
                else:
                    record(stage, file)
        written = size(folder)
        found = analysis(files, material, begin)
        return {"seconds": time.perf_counter() - began, "bytes": written, **found}


def analysis(files: dict[str, Path], material: dict, begin: int) -> dict:
    """The authors' metrics, from their records."""

    def lines(name: str):
        with files[name].open() as file:
            yield from map(json.loads, file)

    def cosine(a, b):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-20)

    def kendall(a, b):
        x, y = (np.sign(v[:, None] - v) for v in (a, b))
        return (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    training = [
        np.array(line)[:, begin + a : begin + b]
        for line, (a, b) in zip(lines("training"), material["kept"], strict=True)
    ]
    queries, starts = np.concatenate(training, axis=1), np.cumsum([0, *(b - a for a, b in material["kept"])])[:-1]
    rows: dict[str, list] = {name: [] for name in METRICS}
    predictions: dict[str, list[int]] = {"zero_shot": [], "in_context": [], "finetuned": []}
    for number, found in enumerate(zip(*(lines(name) for name in predictions), strict=True)):
        for setting, line in zip(predictions, found, strict=True):
            predictions[setting].append(line["pred"])
        zs, icl, ft = (np.array(line["attn_out"]) for line in found)
        zs, icl, ft = (h / (np.linalg.norm(h, axis=-1, keepdims=True) + 1e-20) for h in (zs, icl, ft))
        rows["simaou"].append(cosine(icl - zs, ft - zs))
        zs, icl, ft = (np.array(line["attn_map"]) for line in found)
        rows["simam"].append(cosine(icl, ft).mean(-1))
        rows["simam_before"].append(cosine(icl, zs).mean(-1))
        if number < RANKED:
            context, query = (
                np.array(found[1]["attn_map_context"])[:, material["context"]],
                np.array(found[2]["attn_q"]),
            )
            ranked = []
            for layer in range(len(query)):
                a, b = softmax(context[layer]), softmax(queries[layer] @ query[layer])
                both = [(a, b, 100), (np.add.reduceat(a, starts), np.add.reduceat(b, starts), 5)]
                tau = [kendall(x, y) for x, y, _ in both]
                ranked.append(
                    tau + [len(set(np.argsort(-x)[:k]) & set(np.argsort(-y)[:k])) / min(k, len(x)) for x, y, k in both]
                )
            for name, values in zip(METRICS[3:], np.array(ranked).T, strict=True):
                rows[name].append(values)
    gold = np.array(material["gold"])
    right = {setting: np.array(values) == gold for setting, values in predictions.items()}
    repaired = right["finetuned"] & ~right["zero_shot"]
    recall = float((repaired & right["in_context"]).sum() / repaired.sum()) if repaired.any() else None
    means = {name: np.mean(values, axis=0).tolist() for name, values in rows.items()}
    return {"metrics": means, "rec2ftp": recall, "predictions": predictions}


def run(part: str, file: str) -> dict:
    """A part in a process of its own; its peak memory beside its answer."""
    print(f"{part} ... (load average {os.getloadavg()[0]:.1f})", file=sys.stderr, flush=True)
    output = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--part", part, "--material", file],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(output.stdout.splitlines()[-1])


def compare(mine: dict, theirs: dict) -> list[str]:
    """What differs too much."""
    failures = []
    for setting, predictions in theirs["predictions"].items():
        if predictions != mine["predictions"][setting]:
            failures.append(f"{setting}: predictions differ")
    if mine["rec2ftp"] != theirs["rec2ftp"]:
        failures.append(f"Rec2FTP: {mine['rec2ftp']} and {theirs['rec2ftp']}")
    for name in METRICS:
        gap = np.abs(np.array(mine["metrics"][name]) - np.array(theirs["metrics"][name])).max()
        if not gap <= TOLERANCE:
            failures.append(f"{name}: a layer differs by {gap:.1e}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        required=True,
        help="folder or name of a causal model of transformers that has q_proj, k_proj, v_proj",
    )
    parser.add_argument("--gguf-file", help="its file in that folder")
    parser.add_argument("--data-dir", required=True, help="with NAME/train.jsonl and NAME/validation.jsonl")
    parser.add_argument("--dataset", default="mr")
    parser.add_argument("--template", default="code")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1, help="of the demonstrations")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--part", choices=["prompts", "ours", "authors"], help=argparse.SUPPRESS)
    parser.add_argument("--material", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        import torch

        from momentum_lm.cpu import map_large_tensors

        torch.set_num_threads(args.threads)
        map_large_tensors()  # as fairseq-eval does; for both
        if args.part == "prompts":
            Path(args.material).write_text(json.dumps(prompts(args)))
            print("{}")
            return 0
        result = {"ours": ours, "authors": authors}[args.part](args, args.material)
        print(json.dumps(result | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return 0

    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "material.json"))
        run("prompts", file)
        mine, theirs, again = run("ours", file), run("authors", file), run("ours", file)
    seconds = (mine["seconds"] + again["seconds"]) / 2
    print(f"{args.dataset}, {args.shots} shots, {args.examples} examples, fp32, {args.threads} threads")
    print(f"{'':24}{'seconds':>10}{'s/example':>12}{'on disk, MB':>14}{'peak memory, MB':>18}")
    for name, row, time_ in (("ours", mine, seconds), ("the authors' procedure", theirs, theirs["seconds"])):
        print(f"{name:24}{time_:10.1f}{time_ / args.examples:12.3f}{row['bytes'] / 1e6:14.3f}{row['peak_mb']:18.0f}")
    print(
        f"ratio: time {theirs['seconds'] / seconds:.1f}x (ours {mine['seconds']:.1f} s before, {again['seconds']:.1f} "
        "s after), ",
        end="",
    )
    print(f"disk {theirs['bytes'] / mine['bytes']:.0f}x")
    gaps = {name: np.abs(np.array(mine["metrics"][name]) - np.array(theirs["metrics"][name])).max() for name in METRICS}
    print("largest difference of a layer: " + ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), "ours": mine, "again": again, "authors": theirs}, indent=1)
        )
    failures = compare(mine, theirs)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

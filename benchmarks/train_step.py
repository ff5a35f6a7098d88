"""Cost of a training step, side by side: ours with and without momentum, and stock fairseq of the same shape.

    python benchmarks/train_step.py [--shape 125m] [--length 1024] [--batch 4] [--steps 2] [--json OUT.json]

Each variant runs in a process of its own (so peak memory is its own), the variants alternate over --rounds, and each ratio is
between medians of one run. CPU time, summed over threads, is what to read where other work shares the machine. A step is forward,
backward, gradient norm and AdamW on random tokens, in fp32.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

VARIANTS = {
    "stock fairseq transformer_lm_gpt": ("transformer_lm_gpt", "cross_entropy", "adam"),
    "gpt_lm": ("gpt_lm", "chunked_cross_entropy", "fused_adamw"),
    "momentum_lm": ("momentum_lm", "chunked_cross_entropy", "fused_adamw"),
}


def measure(variant: str, args: argparse.Namespace) -> dict[str, float | list[float]]:
    """Times the steps of one variant with fairseq's own task, criterion and optimizer."""
    import tempfile

    import torch
    from fairseq import criterions, optim, options, tasks
    from fairseq.data import Dictionary
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import momentum_lm
    from momentum_lm.models.language_model import SIZES

    momentum_lm.register()
    torch.set_num_threads(args.threads)
    arch, criterion_name, optimizer_name = VARIANTS[variant]
    layers, width, heads = SIZES[args.shape]
    flags = [
        "--decoder-layers",
        layers,
        "--decoder-embed-dim",
        width,
        "--decoder-ffn-embed-dim",
        4 * width,
        "--decoder-attention-heads",
        heads,
    ]
    if arch == "transformer_lm_gpt":
        flags += ["--share-decoder-input-output-embed", "--dropout", 0, "--attention-dropout", 0]
    else:
        arch = f"{arch}_{args.shape}"
    folder = tempfile.mkdtemp()
    dictionary = Dictionary()
    for i in range(args.vocab - 4):
        dictionary.add_symbol(str(i))
    dictionary.save(f"{folder}/dict.txt")
    words = [
        folder,
        "--task",
        "language_modeling",
        "--arch",
        arch,
        "--criterion",
        criterion_name,
        "--optimizer",
        optimizer_name,
        "--cpu",
        "--lr",
        "1e-4",
        "--adam-betas",
        "(0.9, 0.98)",
        "--tokens-per-sample",
        args.length,
        *flags,
    ]
    parsed = options.parse_args_and_arch(options.get_training_parser(), [str(w) for w in words])
    cfg = convert_namespace_to_omegaconf(parsed)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(0)
    model = task.build_model(cfg.model)
    criterion = criterions.build_criterion(cfg.criterion, task)
    optimizer = optim.build_optimizer(cfg.optimizer, list(model.parameters()))
    tokens = torch.randint(4, args.vocab, (args.batch, args.length + 1))
    sample = {
        "net_input": {"src_tokens": tokens[:, :-1].contiguous(), "src_lengths": torch.full((args.batch,), args.length)},
        "target": tokens[:, 1:].contiguous(),
        "ntokens": args.batch * args.length,
        "nsentences": args.batch,
    }

    times, busy = [], []
    for step in range(args.steps + 1):  # the first allocates
        start, started = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        task.train_step(sample, model, criterion, optimizer, step)
        optimizer.multiply_grads(1 / sample["ntokens"])
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - started)
    return {
        "seconds": times[1:],
        "cpu_seconds": busy[1:],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "imported_mib": args.base,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=51200)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return

    results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[variant].append(json.loads(output.splitlines()[-1]))
    seconds, busy = (
        {v: statistics.median(s for r in rows for s in r[key]) for v, rows in results.items()} for key in ("seconds", "cpu_seconds")
    )
    memory = {v: max(r["peak_mib"] for r in rows) for v, rows in results.items()}
    print(
        f"{args.shape}, {args.batch} x {args.length} tokens, vocabulary {args.vocab}, fp32, "
        f"{args.threads} threads, {args.rounds} x {args.steps} steps"
    )
    for variant in VARIANTS:
        spread = [s for r in results[variant] for s in r["seconds"]]
        rate = args.batch * args.length / seconds[variant]
        print(
            f"{variant:34} {seconds[variant]:7.2f} s ({min(spread):.2f}-{max(spread):.2f})"
            f"  {rate:7.0f} tokens/s  peak {memory[variant]:6.0f} MiB"
        )
    stock, plain, momentum = VARIANTS
    ratios = {
        "step time, momentum_lm / gpt_lm": seconds[momentum] / seconds[plain],
        "CPU time, momentum_lm / gpt_lm": busy[momentum] / busy[plain],
        "step time, gpt_lm / stock": seconds[plain] / seconds[stock],
        "CPU time, gpt_lm / stock": busy[plain] / busy[stock],
        "peak memory, gpt_lm / stock": memory[plain] / memory[stock],
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": results, "ratios": ratios}, file, indent=1)


if __name__ == "__main__":
    main()

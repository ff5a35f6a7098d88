"""Cost of a training step, side by side: ours with and without momentum, a plain torch GPT and stock fairseq of the
same shape; or, of the Llama form, transformers' LlamaForCausalLM.

    python benchmarks/train_step.py [--shape 125m] [--length 1024] [--batch 4] [--steps 2] [--json OUT.json]
    python benchmarks/train_step.py --family llama --shape 135m --batch 1 --vocab 49152
    python benchmarks/train_step.py --filters --batch 1   # every kind of momentum at every place
    python benchmarks/train_step.py --device cuda --shape 350m --length 2048 --batch 16 --steps 20   # bf16, compiled

Each variant runs in a process of its own (so peak memory is its own), the variants alternate over --rounds, and each
ratio is between medians of one run. All but stock fairseq keep freed memory, as our trainer does. What momentum adds is
less than a machine's speed drifts within a minute: one more process takes --pairs of steps with and without it, one
right after the other, of one sequence each on a CPU, and the ratios of the pairs are averaged (geometrically, with a
95% interval that takes pairs as independent). CPU time, summed over threads, is what to read where other work shares
the machine. --filters measures each kind of momentum at each place alone, beside a step without. A step is forward,
backward, gradient norm and AdamW on random tokens; on a GPU stock fairseq runs with --fp16, the fastest that it has.
"""

import argparse
import contextlib
import functools
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import fairseq_compat  # noqa: F401  (before fairseq: no .pth file may be read here)
from momentum_lm.errors import main_guard

STOCK, PLAIN, LLAMA = "stock fairseq transformer_lm_gpt", "plain torch GPT", "transformers LlamaForCausalLM"
PRODUCTS = "matrix products alone"
FAMILIES = {"gpt": (STOCK, PLAIN, "gpt_lm", "momentum_lm", PRODUCTS), "llama": (LLAMA, "llama_lm", "momentum_llama_lm")}
OURS = {"gpt": ("gpt_lm", "momentum_lm"), "llama": ("llama_lm", "momentum_llama_lm")}  # without momentum, and with it


def fairseq_step(variant: str, args: argparse.Namespace, flags: Sequence[str] = ()) -> Callable[[int], None]:
    """step(number) of one of fairseq's architectures, with fairseq's own task, criterion and optimizer; ``flags``: more
    for it.
    """
    import torch
    from fairseq import criterions, optim, options, tasks, utils
    from fairseq.data import Dictionary
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import momentum_lm
    from momentum_lm.model.sizes import GPT_SIZES

    momentum_lm.register()
    stock = variant == STOCK
    criterion_name, optimizer_name = ("cross_entropy", "adam") if stock else ("chunked_cross_entropy", "fused_adamw")
    if stock:
        arch = "transformer_lm_gpt"
        layers, width, heads, _ = GPT_SIZES[args.shape].values()
        words = ["--decoder-layers", layers, "--decoder-embed-dim", width, "--decoder-ffn-embed-dim", 4 * width]
        words += ["--decoder-attention-heads", heads]
        words += ["--share-decoder-input-output-embed", "--dropout", 0, "--attention-dropout", 0]
    else:
        arch, words = f"{variant}_{args.shape}", []
    if args.device == "cpu":
        words += ["--cpu"]
    elif stock:
        words += ["--fp16"]
    elif args.compile:
        words += ["--compile"]
    words = [
        "DATA", "--task", "language_modeling" if stock else "momentum_language_modeling", "--arch", arch,
        "--criterion", criterion_name,
        "--optimizer", optimizer_name, "--lr", "1e-4", "--adam-betas", "(0.9, "
        "0.98)", "--tokens-per-sample", args.length,
        "--log-interval", 10**9, *words, *flags,
    ]  # fmt: skip
    dictionary = Dictionary()
    for i in range(args.vocab - 4):
        dictionary.add_symbol(str(i))
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save(f"{folder}/dict.txt")
        words[0] = folder
        cfg = convert_namespace_to_omegaconf(
            options.parse_args_and_arch(options.get_training_parser(), [str(w) for w in words])
        )
        task = tasks.setup_task(cfg.task)
    torch.manual_seed(0)
    model = task.build_model(cfg.model).to(args.device)
    criterion = criterions.build_criterion(cfg.criterion, task)
    params = list(model.parameters())
    if cfg.common.fp16:
        model = model.half()
        optimizer = optim.FP16Optimizer.build_optimizer(cfg, params)
    else:
        optimizer = optim.build_optimizer(cfg.optimizer, params)
    tokens = random_tokens(args)
    sample = {
        "net_input": {"src_tokens": tokens[:, :-1].contiguous(), "src_lengths": torch.full((args.batch,), args.length)},
        "target": tokens[:, 1:].contiguous(),
        "ntokens": args.batch * args.length,
        "nsentences": args.batch,
    }
    if args.device == "cuda":
        sample = utils.move_to_cuda(sample)

    def step(number: int) -> None:
        optimizer.zero_grad()
        # 1 more: the task measures momentum in update 0, which a compiler would compile as well
        task.train_step(sample, model, criterion, optimizer, number + 1)
        optimizer.multiply_grads(1 / sample["ntokens"])
        try:
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
        except OverflowError:  # of --fp16, which has lowered its loss scale; the trainer goes on too
            pass

    return step


def plain_step(args: argparse.Namespace) -> Callable[[int], None]:
    """The same for a GPT in plain torch: SDPA, fused AdamW, norms by foreach; on a GPU compiled, in bf16 autocast."""
    import torch
    from plain_gpt import PlainGPT

    from momentum_lm.model.sizes import GPT_SIZES

    with torch.device(args.device):
        model = PlainGPT(args.vocab, args.length, *list(GPT_SIZES[args.shape].values())[:3])
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.98), fused=True)
    forward = model
    if args.device == "cuda" and args.compile:
        if getattr(args, "by_blocks", False):  # as ours, and in a tenth of the time
            model.compile_blocks()
        else:
            forward = torch.compile(model)
    tokens = random_tokens(args).to(args.device)

    def step(number: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else contextlib.nullcontext():
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        (loss / (args.batch * args.length)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def llama_step(args: argparse.Namespace) -> Callable[[int], None]:
    """The same for transformers' Llama: SDPA, fused AdamW, norms by foreach; on a GPU compiled, in bf16 autocast."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from momentum_lm.model.sizes import LLAMA_SIZES

    size = LLAMA_SIZES[args.shape]
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=size["dim"], intermediate_size=size["ffn_dim"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        max_position_embeddings=args.length, tie_word_embeddings=size["tie_embeddings"], use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": size["rotary_base"]}, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.98), fused=True)
    forward = torch.compile(model) if args.device == "cuda" and args.compile else model
    tokens = random_tokens(args)[:, :-1].contiguous().to(args.device)

    def step(number: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else contextlib.nullcontext():
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def products_step(args: argparse.Namespace) -> Callable[[int], None]:
    import torch
    from plain_gpt import MatrixProducts

    from momentum_lm.model.sizes import GPT_SIZES

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    products = MatrixProducts(
        args.vocab, args.length, *list(GPT_SIZES[args.shape].values())[:3], args.batch, args.device, dtype
    )
    return lambda number: products()


def random_tokens(args: argparse.Namespace):
    import torch

    return torch.randint(4, args.vocab, (args.batch, args.length + 1), generator=torch.Generator().manual_seed(0))


def timed(step: Callable[[int], None], number: int, args: argparse.Namespace) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    import torch

    start, started = time.perf_counter(), time.process_time()
    step(number)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - started


def columns(times: list[tuple[float, float]]) -> dict[str, list[float]]:
    return {"seconds": [wall for wall, _ in times], "cpu_seconds": [cpu for _, cpu in times]}


def measure(variant: str, args: argparse.Namespace) -> dict[str, float | list[float]]:
    import torch

    from momentum_lm.cpu import keep_memory

    torch.set_num_threads(args.threads)
    if variant != STOCK:
        keep_memory()
    others = {PLAIN: plain_step, PRODUCTS: products_step, LLAMA: llama_step}
    step = others[variant](args) if variant in others else fairseq_step(variant, args)
    times = columns([timed(step, number, args) for number in range(args.warm + args.steps)][args.warm :])
    return {**times, "peak_mib": peak_mib(args)}


def measure_pairs(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of steps with and without momentum, in pairs."""
    import torch

    from momentum_lm.cpu import keep_memory

    torch.set_num_threads(args.threads)
    keep_memory()
    args.batch = pair_batch(args)
    steps = {variant: fairseq_step(variant, args) for variant in OURS[args.family]}
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in steps}
    for number in range(args.warm + args.pairs):
        for variant in list(steps)[:: 1 if number % 2 == 0 else -1]:  # so that a drift favours neither
            times[variant].append(timed(steps[variant], number, args))
    return {variant: columns(taken[args.warm :]) for variant, taken in times.items()}


def filters_of(words: str) -> list[str]:
    """What ``--filters`` names: ``all``, or KIND@PLACE with commas between."""
    from momentum_lm.model.config import BUILT_IN_FILTERS, PLACES
    from momentum_lm.studies.flags import choices

    every = [
        f"{kind}@{place}" for place in PLACES for kind in BUILT_IN_FILTERS[1:] if kind == "ema" or place != "depth"
    ]
    return every if words == "all" else choices(words, "--filters", every)


def measure_filters(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of steps without momentum, and of each filter alone, forward and backward at the shape that it has in
    the decoder, with how often a step has it: what it adds is a few percent, and pairs of steps differ by more.
    """
    import torch

    from momentum_lm.cpu import keep_memory
    from momentum_lm.model import DecoderConfig
    from momentum_lm.model.filters import Around, heads_at, make_filter
    from momentum_lm.model.sizes import architecture

    torch.set_num_threads(args.threads)
    keep_memory()
    vanilla = OURS[args.family][0]
    step = fairseq_step(vanilla, args)
    found: dict[str, Any] = {"step": [timed(step, n, args) for n in range(args.warm + args.steps)][args.warm :]}
    for name in filters_of(args.filters):
        kind, place = name.split("@")
        shape = architecture(f"{vanilla}_{args.shape}")
        options = {"momentum_kind": kind, "momentum_at": place, "momentum_learned": kind == "ema"}
        config = DecoderConfig(args.vocab, **{**shape, **options})
        module: Any = make_filter(config, place)
        module.to(args.device)
        heads, size = heads_at(config, place)
        x = torch.randn(args.batch, heads, args.length, size, device=args.device, requires_grad=True)
        apply = (
            functools.partial(module.across, x)
            if place == "depth"
            else functools.partial(Around().filtered, place, module)
        )
        times = {"embedding": 1, "depth": config.layers - 1}.get(place, config.layers)
        seconds = [timed(lambda _, apply=apply, x=x: apply(x).sum().backward(), n, args) for n in range(2 + args.pairs)]
        found[name] = {"times": times, "seconds": seconds[2:]}
    return found


def print_filters(found: dict[str, Any], args: argparse.Namespace) -> None:
    """The table of what each filter costs: median CPU time (on a GPU: time), as a share of the fastest step's."""
    which = 0 if args.device == "cuda" else 1
    step = min(times[which] for times in found["step"])
    vanilla = OURS[args.family][0]
    print(f"{vanilla}_{args.shape}, {args.batch} x {args.length} tokens: a step takes {step:.2f} s of CPU time")
    print("| kind | place | alone, a layer | a step with it |\n|---|---|---|---|")
    for name, filter_ in found.items():
        if name != "step":
            alone = statistics.median(times[which] for times in filter_["seconds"])
            share = 1 + filter_["times"] * alone / step
            print(f"| {' | '.join(name.split('@'))} | {alone * 1e3:.1f} ms | {share:.3f} |")


def peak_mib(args: argparse.Namespace) -> float:
    """The most memory that this process had: of the GPU, or its own."""
    import torch

    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pair_batch(args: argparse.Namespace) -> int:
    """On a CPU one sequence, so that the two steps of a pair lie a few seconds apart."""
    return 1 if args.device == "cpu" else args.batch


def ratio_of_pairs(pairs: dict[str, dict[str, list[float]]], key: str) -> tuple[float, float, float]:
    """Geometric mean of the cost with momentum / without, over the pairs, and its 95% interval, by Student's t."""
    from momentum_lm.analysis.statistics import t_interval

    without, with_momentum = (times[key] for times in pairs.values())
    found = t_interval([math.log(a / b) for a, b in zip(with_momentum, without, strict=True)])
    return math.exp(found.estimate), math.exp(found.low), math.exp(found.high)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gpt", choices=list(FAMILIES))
    parser.add_argument("--shape", default="125m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=51200)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant")
    parser.add_argument("--pairs", type=int, default=30, help="of steps with and without momentum")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--compile", default=True, action=argparse.BooleanOptionalAction, help="on a GPU; stock fairseq never"
    )
    parser.add_argument(
        "--filters", nargs="?", const="all", metavar="KIND@PLACE,...", help="measure these filters alone, or every one"
    )
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("--pairs: at least 2")
    args.warm = 5 if args.device == "cuda" else 1  # the first steps allocate and compile
    if args.variant:
        special = {"pairs": measure_pairs, "filters": measure_filters}
        print(json.dumps(special[args.variant](args) if args.variant in special else measure(args.variant, args)))
        return 0
    if args.filters:
        filters_of(args.filters)

    def run(variant: str) -> dict:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(output.splitlines()[-1])

    if args.filters:
        found = run("filters")
        print_filters(found, args)
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"arguments": vars(args), "filters": found}, file, indent=1)
        return 0
    variants = FAMILIES[args.family]
    results: dict[str, list[dict]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            results[variant].append(run(variant))
    pairs = run("pairs")
    seconds = {v: statistics.median(s for r in rows for s in r["seconds"]) for v, rows in results.items()}
    memory = {v: max(r["peak_mib"] for r in rows) for v, rows in results.items()}
    ours, momentum = OURS[args.family]
    where = f"{args.threads} threads, fp32" if args.device == "cpu" else "bf16 autocast" + ", compiled" * args.compile
    print(
        f"{ours}_{args.shape}, {args.batch} x {args.length} tokens, vocabulary {args.vocab}, {where}, {args.rounds} x "
        f"{args.steps} steps"
    )
    for variant in variants:
        spread = [s for r in results[variant] for s in r["seconds"]]
        rate = args.batch * args.length / seconds[variant]
        line = f"{variant:34} {seconds[variant]:8.3f} s ({min(spread):.3f}-{max(spread):.3f})  {rate:8.0f} tokens/s"
        share = mfu(rate, args)
        print(f"{line}  peak {memory[variant]:6.0f} MiB" + ("" if share is None else f"  MFU {share:.1%}"))
    ratios = {}
    for rival in variants[: variants.index(ours)]:
        ratios[f"tokens/s, {ours} / {rival}"] = seconds[rival] / seconds[ours]
        ratios[f"peak memory, {ours} / {rival}"] = memory[ours] / memory[rival]
    if PRODUCTS in variants:
        ratios[f"step time, {ours} / its {PRODUCTS}"] = seconds[ours] / seconds[PRODUCTS]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    for kind, key in (("step", "seconds"), ("CPU", "cpu_seconds")):
        name = f"{kind} time, {momentum} / {ours}"
        ratios[name], low, high = ratio_of_pairs(pairs, key)
        print(
            f"{name}: {ratios[name]:.3f} ({low:.3f} to {high:.3f}, {args.pairs} pairs of {pair_batch(args)} x "
            f"{args.length} tokens)"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), "results": results, "pairs": pairs, "ratios": ratios}, file, indent=1)
    return 0


def mfu(rate: float, args: argparse.Namespace) -> float | None:
    """Share of the GPU's peak in bf16 that its data sheet gives, where it is known."""
    if args.device == "cpu":
        return None
    import torch

    from momentum_lm.model import DecoderConfig
    from momentum_lm.model.sizes import architecture
    from momentum_lm.planning.costs import count_parameters, flops_per_token, multiplying
    from momentum_lm.planning.hardware import peak_flops

    config = DecoderConfig(args.vocab, **architecture(f"{OURS[args.family][0]}_{args.shape}"))
    peak = peak_flops(torch.cuda.get_device_name())
    flops = flops_per_token(
        multiplying(config, count_parameters(config)), config.layers, config.heads * config.head_dim, args.length
    )
    return rate * flops / peak if peak else None


if __name__ == "__main__":
    sys.exit(main())

"""Stages of gpu_checks.py for a second call: in-context scores and the analysis, the plan's memory, FSDP2."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_job import Job

WORDS = "a film that is good and long bad dull the plot thin but actors are very nobody should see this twice".split()


def write_data(folder: Path, rows: int) -> None:
    """Made-up reviews of which those with "good" are positive, as the data set ``mr``."""
    draw = random.Random(0)
    (folder / "mr").mkdir(parents=True)
    for split in ("train", "validation"):
        texts = [" ".join(draw.choices(WORDS, k=draw.randrange(4, 14))) for _ in range(rows)]
        lines = [json.dumps({"text": text, "label": int("good" in text)}) for text in texts]
        (folder / "mr" / f"{split}.jsonl").write_text("\n".join(lines))


def write_models(folder: Path, smoke: bool) -> dict[str, Callable[..., Any]]:
    """Random models with real tokenizers: what loads them on a device, by name."""
    import tokenizers
    import transformers

    from momentum_lm.lm.huggingface import load_huggingface
    from momentum_lm.lm.native import load_native
    from momentum_lm.model import Decoder, DecoderConfig
    from momentum_lm.text.tokenizer import load_tokenizer
    from momentum_lm.text.vocabulary import train_sentencepiece

    draw = random.Random(1)
    vocabulary = [*WORDS, "Review:", "Sentiment:", "Positive", "Negative"]
    sentences = [" ".join(draw.choices(vocabulary, k=draw.randrange(3, 12))) for _ in range(2000)]
    dim, layers = (32, 2) if smoke else (512, 8)
    ours, theirs = folder / "ours", folder / "theirs"
    ours.mkdir()
    (ours / "sentencepiece.model").write_bytes(train_sentencepiece(sentences, 320))
    torch.manual_seed(0)
    config = DecoderConfig(
        load_tokenizer(ours).vocab_size, dim, 2 * dim, layers, 4, momentum_kind="ema", momentum_eta=0.7
    )
    state = Decoder(config).state_dict()
    torch.save({"model": {f"decoder.{name}": tensor for name, tensor in state.items()}}, ours / "model.pt")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences, 300, special_tokens=["</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>").save_pretrained(theirs)
    shape = {"hidden_size": dim, "intermediate_size": 2 * dim, "num_hidden_layers": layers}
    llama = transformers.LlamaConfig(vocab_size=300, num_attention_heads=4, num_key_value_heads=2, **shape)
    transformers.LlamaForCausalLM(llama).save_pretrained(theirs)
    return {
        "ours": functools.partial(load_native, ours / "model.pt", {"decoder_attention_heads": 4}),
        "transformers": functools.partial(load_huggingface, str(theirs)),
    }


def scores(results: Path) -> list[float]:
    lines = [json.loads(line) for line in (results / "predictions.jsonl").read_text().splitlines()]
    return [score for line in lines for score in line["scores"]]


def largest(a: Any, b: Any) -> float:
    """The largest difference of two values of the same form, whose numbers may lie in lists and mappings."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), "other keys"
        return max((largest(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list):
        assert len(a) == len(b), f"{len(a)} and {len(b)} values"
        return max((largest(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return abs(a - b) if isinstance(a, float) and isinstance(b, float) else 0.0


def in_context(job: Job) -> None:
    """Scores of two models in fp32 and bf16, and the analysis, on the device and on the CPU beside it."""
    from momentum_lm.icl.datasets.loading import load_dataset
    from momentum_lm.studies import classification, icl_vs_finetuning

    folder = job.work / "in_context"
    write_data(folder, 8 if job.smoke else 64)
    models = write_models(folder, job.smoke)
    data = [load_dataset("mr", str(folder))]
    prompts = classification.Settings(shots=(2 if job.smoke else 8,), seeds=(1,), sampling="balanced")

    def evaluated(name: str, device: str, dtype: torch.dtype = torch.float32) -> list[float]:
        results = folder / f"{name}-{device}-{dtype}"
        if not results.exists():  # the CPU's may be there
            lm = models[name](device=device, dtype=dtype)
            classification.evaluate(lm, data, prompts, results, show_progress=False)
        return scores(results)

    found: dict[str, float] = {}
    for name in models:
        with job.part(f"scores of {name}"):
            found[name] = largest(evaluated(name, job.device), evaluated(name, "cpu"))
            job.record(scores=found)
    with job.part("scores in bf16"):
        job.record(scores_bf16=largest(evaluated("ours", job.device, torch.bfloat16), evaluated("ours", "cpu")))
    with job.part("analysis"):
        few = dataclasses.replace(prompts, shots=(2,), limit=2 if job.smoke else 20)
        settings = icl_vs_finetuning.Settings(few, rates=(0.01,), controls=())
        runs = {}
        for device in {"cpu", job.device}:
            results = folder / f"analysis-{device}"
            icl_vs_finetuning.analyse(models["ours"](device=device), data, settings, results, show_progress=False)
            runs[device] = json.loads((results / "results.json").read_text())["runs"][0]
        job.record(analysis=max(largest(runs["cpu"][form], runs[job.device][form]) for form in ("paper", "corrected")))


def memory(job: Job) -> None:
    """A step of the decoder, not compiled, beside what the plan says it takes."""
    import train_step
    from gpu_step import GIB, collect, prepare, settings

    from momentum_lm.model import DecoderConfig
    from momentum_lm.model.sizes import GPT_SIZES
    from momentum_lm.planning.memory import step_memory

    args = settings(job, compile=False)
    layers, dim, heads, _ = GPT_SIZES[args.shape].values()
    for kind, variant in zip(("none", "ema"), train_step.OURS["gpt"], strict=True):
        if job.smoke and kind == "none":
            continue
        with job.part(kind):
            config = DecoderConfig(
                args.vocab, dim, 4 * dim, layers, heads, max_positions=args.length, momentum_kind=kind
            )
            collect(job.device)
            step = prepare(lambda args, variant=variant: train_step.fairseq_step(variant, args), args)
            planned = step_memory(
                config, args.batch, args.length, bf16=job.device == "cuda", gpu=job.device == "cuda", accumulate=False
            ).total
            row: dict[str, Any] = {"planned_gib": planned / GIB, "batch": args.batch}
            if job.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step(9)
                row |= {
                    "measured_gib": torch.cuda.max_memory_allocated() / GIB,
                    "of_plan": torch.cuda.max_memory_allocated() / planned,
                }
            job.record(**{kind: row}, of_plan=row.get("of_plan"))
            del step


def fsdp(job: Job) -> None:
    """Fully sharded over a group of one process, beside the same without."""
    from gpu_training import device_flags, train

    folder = job.bundle / "references" / "data"
    flags = [*device_flags(job.device), "--autocast", "none", "--save-dir", str(job.work / "fsdp")]
    alone = train(folder, flags, job.smoke)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    backend = "nccl" if job.device == "cuda" else "gloo"
    sharded = train(folder, [*flags, "--ddp-backend", "fully_sharded", "--distributed-backend", backend], job.smoke)
    assert torch.distributed.is_initialized() and torch.distributed.get_backend() == backend
    job.record(
        difference=max(abs(a - b) / b for a, b in zip(sharded, alone, strict=True)), losses=sharded, backend=backend
    )

"""The stages of gpu_checks.py, in order of value, and what each tells: data, from which runs and documents are made.

A new kernel, decoder or filter goes into an existing stage (a selection of tests, a variant) or becomes an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MINUTES = 9.0  # of a call


def percent(interval: Mapping[str, float]) -> str:
    """Of a share with its interval: ``+1.2% (+0.9% to +1.5%, n = 20)``."""
    return f"{interval['estimate']:+.1%} ({interval['low']:+.1%} to {interval['high']:+.1%}, n = {interval['n']})"


@dataclass(frozen=True)
class Check:
    """One number: ``key`` of the stage's results (``a/b`` looks into a mapping), and how to show it."""

    key: str
    text: str
    form: str | Callable[[Any], str] = "{}"
    at_least: float | None = None
    at_most: float | None = None
    readme: str = ""  # how docs/performance.md calls it; without, it is not there

    def value(self, results: Mapping[str, Any]) -> Any:
        """None where it is not known."""
        found: Any = results
        for name in self.key.split("/"):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def show(self, results: Mapping[str, Any]) -> str:
        value = self.value(results)
        if value is None:
            return "not yet measured"
        return self.form(value) if callable(self.form) else self.form.format(value)

    def met(self, results: Mapping[str, Any]) -> bool | None:
        """None without a goal or a value."""
        value = self.value(results)
        value = value.get("estimate") if isinstance(value, Mapping) else value
        if value is None or (self.at_least is None and self.at_most is None):
            return None
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def goal(self) -> str:
        limits = [("at least", self.at_least), ("at most", self.at_most)]
        share = self.form is percent or "%" in str(self.form)
        return ", ".join(
            f"{word} {100 * limit:g}%" if share else f"{word} {limit:g}" for word, limit in limits if limit is not None
        )


@dataclass(frozen=True)
class Stage:
    """``work``: MODULE:FUNCTION, which takes a Job. ``text``: what it tells, for GPU_CHECKS.md.

    ``seconds``: its share of nine minutes, None: the rest. It is not begun with ``least`` seconds or fewer.
    """

    name: str
    work: str
    text: str
    seconds: float | None
    least: float
    checks: tuple[Check, ...] = ()

    def summary(self, results: Mapping[str, Any]) -> str:
        known = [check for check in self.checks if check.value(results) is not None]
        return "; ".join(
            f"{check.text} {check.show(results)}" + " (!)" * (check.met(results) is False) for check in known
        )


FIRST = (
    Stage(
        "device",
        "gpu_stages:device",
        "The device, its ceilings as measured, versions.",
        60,
        5,
        (
            Check("copy_tb_per_s", "copying, TB/s, bytes read and written", "{:.2f}", readme="copying, TB/s"),
            Check("matmul_tflops", "bf16 matrix product, TFLOP/s", "{:.0f}", readme="bf16 matrix product, TFLOP/s"),
            Check("versions", "versions", lambda found: ", ".join(f"{k} {v}" for k, v in found.items() if v)),
        ),
    ),
    Stage(
        "kernels",
        "gpu_stages:kernels",
        "A dozen checks of the fused kernels against the equation in float64: precisions, segments, states, "
        "learned decays, strides, odd lengths, gradients.",
        90,
        20,
        (
            Check("passed", "checks passed", readme="kernel checks against float64 that passed"),
            Check("failed", "checks failed", at_most=0, readme="kernel checks that failed"),
        ),
    ),
    Stage(
        "step",
        "gpu_step:step",
        "A training step of 350M parameters at 2,048 tokens, bf16, compiled: forward, backward, gradient norm, AdamW.",
        150,
        40,
        (
            Check(
                "variants/gpt_lm/tokens_per_s",
                "`gpt_lm_350m`, tokens/s",
                "{:,.0f}",
                readme="`gpt_lm_350m`, T = 2,048, bf16, compiled: tokens/s",
            ),
            Check("variants/gpt_lm/mfu", "`gpt_lm_350m`, MFU", "{:.1%}", at_least=0.5, readme="its MFU"),
            Check(
                "variants/gpt_lm/peak_gib", "`gpt_lm_350m`, peak memory, GiB", "{:.1f}", readme="its peak memory, GiB"
            ),
            Check(
                "variants/momentum_lm/tokens_per_s",
                "`momentum_lm_350m`, tokens/s",
                "{:,.0f}",
                readme="`momentum_lm_350m`, tokens/s",
            ),
            Check("variants/momentum_lm/peak_gib", "`momentum_lm_350m`, peak memory, GiB", "{:.1f}"),
            Check(
                "momentum_share",
                "momentum's share of a step, pairs of steps",
                percent,
                at_most=0.02,
                readme="momentum's share of a step",
            ),
            Check(
                "variants/plain/tokens_per_s",
                "a plain torch GPT, compiled, tokens/s",
                "{:,.0f}",
                readme="a plain torch GPT, compiled, tokens/s",
            ),
            Check("variants/plain/mfu", "a plain torch GPT, MFU", "{:.1%}"),
            Check("variants/plain/peak_gib", "a plain torch GPT, peak memory, GiB", "{:.1f}"),
            Check(
                "against_plain",
                "`gpt_lm` / plain torch GPT, tokens/s",
                "{:.2f}",
                at_least=1.0,
                readme="`gpt_lm` / plain torch GPT",
            ),
            Check(
                "variants/stock/tokens_per_s",
                "stock fairseq, fp16, tokens/s",
                "{:,.0f}",
                readme="stock fairseq, fp16, tokens/s",
            ),
            Check("variants/stock/peak_gib", "stock fairseq, peak memory, GiB", "{:.1f}"),
            Check(
                "against_stock",
                "`gpt_lm` / stock fairseq, tokens/s",
                "{:.2f}",
                at_least=1.5,
                readme="`gpt_lm` / stock fairseq",
            ),
            Check("flash", "kernels of flash attention in a step", at_least=1),
        ),
    ),
    Stage(
        "ema_speed",
        "gpu_stages:ema_speed",
        "The EMA kernel beside copying the same bytes, B8 H16 T2048 D64 bf16.",
        45,
        15,
        (
            Check(
                "of_copy/forward",
                "forward, of copy bandwidth",
                "{:.0%}",
                at_least=0.7,
                readme="EMA kernel, forward, of copy bandwidth",
            ),
            Check(
                "of_copy/backward",
                "backward, of copy bandwidth",
                "{:.0%}",
                at_least=0.7,
                readme="EMA kernel, backward, of copy bandwidth",
            ),
            Check("of_copy/forward, learned", "forward with a learned decay, of copy bandwidth", "{:.0%}"),
            Check("of_copy/backward, learned", "backward with a learned decay, of copy bandwidth", "{:.0%}"),
            Check("of_copy/forward, packed", "forward of packed documents, of copy bandwidth", "{:.0%}"),
            Check("speedup", "both ways, against plain torch", "{:.1f}x"),
        ),
    ),
    Stage(
        "training",
        "gpu_training:training",
        "Losses of 40 updates of `fairseq-train` beside fp32 on a CPU: largest relative difference.",
        60,
        20,
        (
            Check(
                "differences/fp32", "fp32", "{:.3%}", at_most=1e-3, readme="losses of 40 updates beside a CPU's, fp32"
            ),
            Check("differences/bf16", "bf16 autocast", "{:.3%}", at_most=0.02, readme="the same, bf16 beside fp32"),
            Check("differences/packed", "packed documents, fp32", "{:.3%}", at_most=1e-3),
            Check("differences/compiled", "bf16, compiled", "{:.3%}", at_most=0.02),
            Check("differences/fp16", "fp16", "{:.3%}", at_most=0.02),
            Check("compilations/graphs", "graphs compiled in the compiled run"),
            Check("compilations/breaks", "graph breaks in it", at_most=0),
        ),
    ),
    Stage(
        "quality",
        "gpu_quality:quality",
        "Language models of about 30M parameters with rotary positions on film reviews: validation perplexity against "
        "vanilla, over paired seeds.",
        None,
        30,
        (
            Check("tokens_per_run", "training tokens of a run", "{:,}"),
            Check("seeds", "seeds", "{}"),
            Check(
                "perplexity/vanilla",
                "vanilla, perplexity",
                "{:.2f}",
                readme="30M parameters, film reviews: vanilla's perplexity",
            ),
            Check("against_vanilla/ema_0.3", "ema, eta 0.3", percent, readme="against it, ema, eta 0.3"),
            Check("against_vanilla/ema_learned", "ema, learned decays", percent, readme="ema, learned decays"),
            Check("against_vanilla/fir_3", "fir, three taps", percent, readme="fir, three taps"),
            Check("against_vanilla/multi_ema", "multi_ema", percent, readme="multi_ema"),
        ),
    ),
)

SECOND = (
    Stage(
        "all_kernels",
        "gpu_stages:all_kernels",
        "All tests of the kernels, at lengths and shapes of training too.",
        170,
        30,
        (Check("passed", "tests passed"), Check("failed", "tests failed", at_most=0)),
    ),
    Stage(
        "in_context",
        "gpu_second:in_context",
        "In-context scores and the analysis of ICL against finetuning, beside the same machine's CPU.",
        70,
        30,
        (
            Check("scores/ours", "log-probabilities of a checkpoint, fp32: largest difference", "{:.1e}", at_most=1e-3),
            Check(
                "scores/transformers",
                "log-probabilities of a model of transformers, fp32: largest difference",
                "{:.1e}",
                at_most=1e-3,
            ),
            Check("scores_bf16", "log-probabilities, bf16: largest difference", "{:.1e}", at_most=0.1),
            Check("analysis", "metrics of ICL against finetuning: largest difference", "{:.1e}", at_most=1e-2),
        ),
    ),
    Stage(
        "memory",
        "gpu_second:memory",
        "Memory of a 350M step, not compiled, beside `momentum-lm plan`.",
        40,
        15,
        (Check("of_plan", "measured / planned", "{:.3f}", at_least=0.9, at_most=1.1),),
    ),
    Stage(
        "fsdp",
        "gpu_second:fsdp",
        "`--ddp-backend fully_sharded` on one GPU's NCCL group: losses beside one process without.",
        40,
        15,
        (Check("difference", "largest relative difference of losses", "{:.3%}", at_most=1e-3),),
    ),
    Stage(
        "step_more",
        "gpu_step:more",
        "The step once more: a plain torch GPT compiled as a whole, ours not compiled, learned decays, the Llama form.",
        170,
        40,
        (
            Check("against_whole", "`gpt_lm` / plain torch GPT compiled as a whole, tokens/s", "{:.2f}", at_least=1.0),
            Check("variants/eager/tokens_per_s", "`gpt_lm`, not compiled, tokens/s", "{:,.0f}"),
            Check("variants/learned/tokens_per_s", "`momentum_lm` with learned decays, tokens/s", "{:,.0f}"),
            Check("variants/llama_lm/tokens_per_s", "`llama_lm_360m`, tokens/s", "{:,.0f}"),
            Check("variants/momentum_llama_lm/tokens_per_s", "`momentum_llama_lm_360m`, tokens/s", "{:,.0f}"),
            Check(
                "against_transformers", "`llama_lm` / transformers' Llama compiled, tokens/s", "{:.2f}", at_least=1.0
            ),
        ),
    ),
    Stage(
        "launch",
        "gpu_stages:launch",
        "Launch parameters of the EMA kernels, forward and backward, plain and learned: the best beside the chosen.",
        None,
        20,
        (Check("gain", "time of the chosen / of the best", "{:.2f}", at_most=1.05), Check("best", "best")),
    ),
)

REFERENCES = Stage("references", "gpu_training:references", "Losses on a CPU in fp32.", None, 0)

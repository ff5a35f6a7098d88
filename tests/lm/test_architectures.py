"""Architectures of transformers whose caches, masks and attention differ, tiny and random: scores are those of whole
prompts, attention is the model's own, or one line says why not. All of them in the nightly sweep.
"""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from momentum_lm.analysis import metrics  # noqa: E402
from momentum_lm.errors import UserError  # noqa: E402
from momentum_lm.icl import finetuning  # noqa: E402
from momentum_lm.lm.huggingface import HuggingFaceLM  # noqa: E402
from momentum_lm.lm.momentum_attention import add_momentum  # noqa: E402
from momentum_lm.lm.tracing import AttentionTrace, tracing  # noqa: E402
from momentum_lm.lm.verification import apart, shortened_windows, switch_length, trial_lengths  # noqa: E402

SCRIPT = Path(__file__).with_name("causal_models.py")
_spec = importlib.util.spec_from_file_location("causal_models", SCRIPT)
models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models)

NO_INTERFACE = "does not use transformers' attention interface"
# name -> how prompts are read, and what the attention's reading is refused for
REPRESENTATIVE = {
    "openai-gpt": ("slower", NO_INTERFACE),  # takes past_key_values, and ignores them
    "gpt2": ("right", None),
    "mistral": ("right", None),  # a sliding window
    "gemma2": ("right", None),  # soft-capping, in half of the layers a window
    "gemma3_text": ("right", None),  # query norms after the split into heads
    "qwen3": ("right", None),  # query norms before it
    "phi3": ("right", None),  # rotary factors that switch with length
    "gpt_oss": ("right", None),  # attention sinks
    "mamba": ("slower", NO_INTERFACE),
    "exaone4": ("right", None),
    "cohere2": ("right", None),
    "olmo3": ("right", None),
    "llama4_text": ("right", None),  # chunked attention
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_scores_and_attention_are_the_models_own(name, caplog):
    expected, refusal = REPRESENTATIVE[name]
    with caplog.at_level(logging.WARNING, "momentum_lm"):
        outcome, lm = models.evaluation(models.tiny(name), name)
    assert outcome == expected
    assert ("prompts are read as a whole" in caplog.text) == (expected == "slower")
    if refusal is None:
        worst, note = models.attention_apart(lm)
        assert worst < 1e-3 and not note
    else:
        with pytest.raises(UserError, match=refusal):
            models.attention_apart(lm)


def test_a_model_that_sees_the_future_is_refused():
    with pytest.raises(UserError, match=r"bert \(BertLMHeadModel\) is not a causal language model: .*later") as caught:
        HuggingFaceLM(models.tiny("bert"), models.Tokenizer(), "bert", "0")
    assert "\n" not in str(caught.value)
    outcome, lm = models.evaluation(models.tiny("bert", is_decoder=True), "bert")
    assert outcome == "right"
    with pytest.raises(UserError, match="its output projection stands elsewhere"):
        models.attention_apart(lm)


def test_tokens_that_are_never_predicted_are_no_sign_of_anything():
    """Ours after ``momentum-lm convert`` gives them a probability of 0."""
    from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig
    from momentum_lm.formats.remote.modeling_momentum_lm import MomentumLMForCausalLM

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = MomentumLMConfig(
        **sizes, momentum_kind="ema", absent_tokens=list(range(60, 90)), max_position_embeddings=128
    )
    lm = HuggingFaceLM(MomentumLMForCausalLM(config), models.Tokenizer(), "absent", "0")
    assert lm.shares_prefixes
    assert apart(torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[1.0, 2.0, -torch.inf]])) == 0
    assert apart(torch.tensor([[1.0, -torch.inf]] * 2), torch.tensor([[1.0, 2.0]] * 2)) == torch.inf
    assert apart(torch.tensor([[1.0, torch.nan]]), torch.tensor([[1.0, torch.nan]])) == torch.inf


def test_a_model_of_nan_or_too_large_for_the_gpu_is_not_called_something_else(monkeypatch):
    model = models.tiny("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(
        UserError, match=r"llama \(LlamaForCausalLM\) gives probabilities of NaN: .* too large for torch\.float32"
    ):
        HuggingFaceLM(model, models.Tokenizer(), "llama", "0")

    def fill(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "forward", fill)
    with pytest.raises(torch.OutOfMemoryError):
        HuggingFaceLM(model, models.Tokenizer(), "llama", "0")


def test_rotary_factors_that_grow_with_length():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = models.tiny("llama", max_position_embeddings=32, rope_parameters=dynamic)
    assert switch_length(model.config) == 32 and switch_length(models.configuration("llama")) is None
    assert models.evaluation(model, "llama")[0] == "right"  # prompts of up to 36 tokens


def test_rows_on_both_sides_of_a_switch_are_not_traced():
    lm = HuggingFaceLM(models.tiny("phi3"), models.Tokenizer(), "phi3", "0")
    prefix, tokens = lm.start(list(range(20, 50))), torch.tensor([[60, 61, 62, 63]])
    target = torch.tensor([0]), torch.tensor([1]), torch.tensor([7])
    short, _ = lm.log_probs(tokens[:, :2], tokens[:, :2] < 0, *target, prefix)
    assert short.item() != pytest.approx(lm.log_probs(tokens, tokens < 0, *target, prefix)[0].item(), abs=1e-3)
    with (
        pytest.raises(UserError, match="phi3 gives other predictions for rows that are read together beyond 32 tokens"),
        tracing(lm.model, AttentionTrace(torch.tensor([[1]]))),
    ):
        lm.log_probs(tokens, tokens < 0, *target, prefix)


def test_what_is_outside_a_window_is_not_attended_to():
    """Nor ranked: in one layer with a window of 7 tokens the last query sees none of the first ten."""
    lm = HuggingFaceLM(models.tiny("mistral", num_hidden_layers=1), models.Tokenizer(), "mistral", "0")
    trace, tokens = AttentionTrace(torch.tensor([[19]]), relax=True), torch.arange(20, 40)[None]
    changed = tokens.clone()
    changed[:, :10] += 50
    again = AttentionTrace(torch.tensor([[19]]), relax=True)
    for given, kept in ((tokens, trace), (changed, again)):
        with torch.no_grad(), tracing(lm.model, kept):
            lm.model(given, use_cache=False)
    logits = trace.logits[0][0, 0]
    assert logits.isneginf().sum(-1).tolist() == [13] * 4 and logits[:, 13:].isfinite().all()
    for kind in ("logits", "heads", "relaxed", "outputs", "relaxed_outputs"):
        torch.testing.assert_close(getattr(trace, kind)[0], getattr(again, kind)[0])
    found = metrics.training_attention(
        logits[:, :10].numpy(), np.random.default_rng(0).normal(size=(4, 10)), [4, 6], True
    )
    assert all(
        np.isnan(value).all() for value in (found.kendall, found.recall, found.kendall_example, found.recall_example)
    )


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_the_whole_analysis(name):
    """Soft-capping, windows and query norms, with every control; what does not apply is left out."""
    lm = HuggingFaceLM(models.tiny(name, num_hidden_layers=2), models.Tokenizer(), name, "0")
    assert models.analysis(lm) == "right"


def test_windows_of_thousands_are_shortened_for_a_trial():
    model = models.tiny("mistral", sliding_window=4096)
    tokens = torch.arange(20, 60)[None]
    assert (
        trial_lengths(model.config, 10**6)[1] < 40
        and trial_lengths(models.configuration("mistral", sliding_window=50), 10**6)[1] > 50
    )
    with torch.no_grad():
        before = model(tokens).logits
        with shortened_windows(model):
            assert model.config.sliding_window == 8 and not torch.allclose(model(tokens).logits, before)
        assert model.config.sliding_window == 4096 and torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("name", ["gemma2", "cohere2", "granite"])
def test_layerwise_finetuning_predicts_as_the_model_does(name):
    """Final norm, scaled or soft-capped logits: what the model does after its blocks is its own."""
    model, tokens = models.tiny(name), torch.arange(20, 32)[None]
    outputs, tuples, logits = finetuning._block_outputs(model, tokens)
    assert len(outputs) == len(tuples) == 4
    unembed = finetuning._unembedding(model, tuples, tokens[:, 2:-1], outputs[-1][0, 2:-1], logits[0, 2:-1])
    torch.testing.assert_close(unembed(outputs[-1][0, 2:-1]), logits[0, 2:-1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, use_cache=False).logits, logits)


def test_momentum_needs_an_attention_that_sees_what_its_mask_shows():
    model = models.tiny("llama4_text")
    add_momentum(model, 0.5)
    tokens = torch.arange(20, 44)[None]
    changed = tokens.clone()
    # the first chunk: layers of chunked attention, and momentum in them, do not see it from the next one on
    changed[:, :7] += 30
    first = AttentionTrace(torch.tensor([[23]]))
    second = AttentionTrace(torch.tensor([[23]]))
    for given, trace in ((tokens, first), (changed, second)):
        with torch.no_grad(), tracing(model, trace):
            model(given, use_cache=False)
    chunked = model.config.layer_types.index("chunked_attention")
    assert chunked == 0
    torch.testing.assert_close(first.outputs[0], second.outputs[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="eta needs SDPA"):
        add_momentum(models.tiny("gpt_oss"), 0.5)


@pytest.mark.nightly
def test_every_causal_architecture(tmp_path):
    """Evaluation and analysis are right, slower or refused in a line; what cannot be built tiny is few."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, cwd=tmp_path, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(found) == len(models.causal_names()), done.stderr[-2000:]
    outcomes = [
        (each["name"], part, each[part]) for each in found for part in ("evaluation", "analysis") if part in each
    ]
    bad = [outcome for outcome in outcomes if outcome[2].startswith(("wrong", "crash"))]
    assert not bad, "\n".join(map(str, bad))
    assert sum(outcome.startswith("not built") for _, _, outcome in outcomes) < len(found) / 4
    assert (
        sum(outcome.startswith(("right", "slower")) for _, part, outcome in outcomes if part == "evaluation")
        > len(found) / 2
    )

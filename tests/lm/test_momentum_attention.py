"""Momentum in other people's models: against the sum written out, with and without caches. Models are
small and random.
"""

import copy
import dataclasses
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from momentum_lm.cli.evaluate import main  # noqa: E402
from momentum_lm.errors import UserError  # noqa: E402
from momentum_lm.icl.datasets.loading import Example, LabelledDataset, load_spec  # noqa: E402
from momentum_lm.icl.finetuning import Lesson, finetuned  # noqa: E402
from momentum_lm.lm.anatomy import key_value_weights  # noqa: E402
from momentum_lm.lm.attention_interface import attention_modules  # noqa: E402
from momentum_lm.lm.huggingface import HuggingFaceLM  # noqa: E402
from momentum_lm.lm.momentum_attention import add_momentum  # noqa: E402
from momentum_lm.lm.tracing import AttentionTrace, tracing  # noqa: E402
from momentum_lm.studies import classification  # noqa: E402
from momentum_lm.studies import icl_vs_finetuning as study  # noqa: E402
from momentum_lm.studies.untrained import untrained  # noqa: E402

VOCAB, WINDOW = 300, 7
COMMON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
LLAMA = dict(**COMMON, intermediate_size=48, num_key_value_heads=2)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=48),
    "mistral_window": lambda: transformers.MistralConfig(**LLAMA, sliding_window=WINDOW),
}
OUT = {"llama": "o_proj", "mistral_window": "o_proj", "gpt2": "c_proj", "opt": "out_proj", "neox": "dense"}
close = torch.testing.assert_close


def read(folder):
    return json.loads((folder / "results.json").read_text())


def random_model(family, **settings):
    torch.manual_seed(0)
    config = FAMILIES[family]() if isinstance(family, str) else family
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    model = transformers.AutoModelForCausalLM.from_config(config, **settings).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.2)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def naive(values, eta, window=None):
    """sum_{i<t} eta^(t-i) v_i over the last ``window`` tokens, the current one among them; values (T, ...)."""
    sums = []
    for t in range(len(values)):
        first = 0 if window is None else max(0, t - window + 1)
        sums.append(sum((eta ** (t - i) * values[i] for i in range(first, t)), torch.zeros_like(values[0])))
    return torch.stack(sums)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_gains_the_sum_written_out(family, normalize):
    """In float64, from the weights that give the values; in a batch with padding."""
    model = random_model(family).double()
    first = attention_modules(model)[0]
    tokens, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    inputs, mixed = [], []
    first.register_forward_pre_hook(
        lambda module, given, options: inputs.append((given or [options["hidden_states"]])[0]), with_kwargs=True
    )
    getattr(first, OUT[family]).register_forward_pre_hook(lambda module, given: mixed.append(given[0]))
    with torch.no_grad():
        model(tokens, attention_mask=mask)
        add_momentum(model, 0.6, normalize, gate=0.5)
        inputs.clear(), mixed[1:].clear()
        model(tokens, attention_mask=mask)
    weight, bias = (x.double() for x in key_value_weights(model)[0][2:])
    values = (inputs[-1] @ weight.T + bias).unflatten(-1, (-1, 8))  # (B, T, key/value heads, 8)
    factor = 0.5 * (0.4 / 0.6 if normalize else 1)
    for row, begin in ((0, 0), (1, 6)):
        average = naive(values[row, begin:], 0.6, WINDOW if family == "mistral_window" else None)
        expected = factor * average.repeat_interleave(4 // values.shape[2], 1).flatten(1)
        assert expected.norm() > 0.1
        close((mixed[-1] - mixed[0])[row, begin:], expected, atol=2e-6, rtol=2e-6)  # weights came as float32


KINDS = {"ema": {}, "fir": dict(kind="fir", taps=4)}


def test_the_last_few_values_are_a_truncated_average():
    """All taps are the average itself; fewer are those of a window, in one pass and token by token."""
    tokens, logits = random_tokens(1, 12), {}
    for taps in (11, 3, None):
        model = random_model("llama").double()
        add_momentum(model, 0.6, **({} if taps is None else dict(kind="fir", taps=taps)))
        with torch.no_grad():
            logits[taps] = model(tokens).logits
    close(logits[11], logits[None], atol=2e-6, rtol=0)  # the decay of "ema" is in fp32
    close(logits[3][:, :4], logits[None][:, :4], atol=2e-6, rtol=0)
    assert (logits[3] - logits[None])[:, 4:].abs().amax() > 1e-3


@pytest.mark.parametrize("family,kind", [*((family, "ema") for family in FAMILIES), ("llama", "fir")])
def test_with_a_cache_as_in_one_pass(family, kind):
    model = random_model(family)
    add_momentum(model, 0.8, **KINDS[kind])
    tokens, mask = random_tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        for cut_mask in (None, mask):
            positions = None if cut_mask is None else (mask.cumsum(1) - 1).clamp(min=0)
            given = {} if cut_mask is None else {"attention_mask": mask, "position_ids": positions}
            whole = model(tokens, **given, use_cache=False).logits
            cache, start = transformers.DynamicCache(config=model.config), 0
            for step in (18, 1, 1, 4, 1, 15):
                end = start + step
                given = (
                    {}
                    if cut_mask is None
                    else {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
                )
                part = model(tokens[:, start:end], past_key_values=cache, use_cache=True, **given).logits
                seen = mask[:, start:end].bool() if cut_mask is not None else torch.ones(3, step, dtype=torch.bool)
                close(part[seen], whole[:, start:end][seen], atol=1e-5, rtol=1e-5)
                start = end
        alone = model(tokens[1:2, 9:], use_cache=False).logits
        close(whole[1:2, 9:], alone, atol=1e-5, rtol=1e-5)
        assert (whole - random_model(family)(tokens, attention_mask=mask).logits)[0].abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "opt", "mistral_window"])
def test_generation(family, implementation):
    """Greedy and with beams, whose rows of the cache are dealt out anew at every step."""
    model = random_model(family)
    add_momentum(model, 0.8)
    tokens = random_tokens(2, 9)
    for beams in (1, 3):
        settings = dict(max_new_tokens=20, num_beams=beams, do_sample=False, pad_token_id=0)
        expected = model.generate(tokens, use_cache=False, **settings)
        assert torch.equal(model.generate(tokens, cache_implementation=implementation, **settings), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_of_zero_is_the_model_itself(family):
    model, tokens, mask = random_model(family), random_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    before = [model(tokens).logits, model(tokens, attention_mask=mask).logits]
    add_momentum(model, 0.5)
    changed = model(tokens).logits
    assert (changed - before[0]).abs().max() > 0.1
    add_momentum(model, 0.5, gate=0.0)
    assert all(
        torch.equal(x, y)
        for x, y in zip(before, [model(tokens).logits, model(tokens, attention_mask=mask).logits], strict=True)
    )
    add_momentum(model, 0.5)
    assert torch.equal(model(tokens).logits, changed)


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers

    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(
        ["a film that is good", "a film that is bad"], VOCAB, special_tokens=["<s>", "<pad>", "</s>"]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_after_a_shared_prefix_are_those_of_whole_rows(family, side, dtype, tokenizer):
    lm = HuggingFaceLM(random_model(family).to(dtype), tokenizer, family, "")
    add_momentum(lm.model, 0.8)
    prefix, rows = random_tokens(1, 11, seed=3)[0], [random_tokens(n, seed=n) for n in (6, 1, 4)]
    tokens, padding = torch.full((3, 6), 1), torch.ones(3, 6, dtype=torch.bool)
    wanted, expected = [], []
    for i, row in enumerate(rows):
        shift = 6 - len(row) if side == "left" else 0
        tokens[i, shift : shift + len(row)], padding[i, shift : shift + len(row)] = row, False
        whole = lm.model(torch.cat([prefix, row])[None], use_cache=False).logits[0].float().log_softmax(-1)
        for position in (0, len(row) - 1):
            wanted.append((i, shift + position, 250))
            expected.append(whole[11 + position, 250])
    memory = lm.start(prefix.tolist())
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    for _ in range(2):  # reading a prefix does not change it
        found, _ = lm.log_probs(tokens, padding, *torch.tensor(wanted).unbind(1), memory)
        close(found, torch.stack(expected), atol=tolerance, rtol=tolerance)


def test_gradients_flow():
    """Along a random direction, against the difference quotient in float64."""
    model, tokens = random_model("opt").double(), random_tokens(2, 10)
    add_momentum(model, 0.8)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    weight = model.model.decoder.layers[0].self_attn.v_proj.weight
    direction = torch.randn_like(weight)
    for given in (None, mask):

        def loss(given=given):
            return -model(tokens, attention_mask=given).logits.log_softmax(-1)[:, 3:, 7].mean()

        slope = torch.autograd.grad(loss(), weight)[0]
        with torch.no_grad():
            weight.add_(direction, alpha=1e-5)
            above = loss().item()
            weight.sub_(direction, alpha=2e-5)
            below = loss().item()
            weight.add_(direction, alpha=1e-5)
        assert (slope * direction).sum().item() == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_finetuning_leaves_model_and_momentum_as_they_were(tokenizer):
    lm = HuggingFaceLM(random_model("gpt2"), tokenizer, "gpt2", "")
    add_momentum(lm.model, 0.6)
    before, tokens = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}, random_tokens(1, 8)
    logits = lm.model(tokens).logits
    with finetuned(lm.model, [Lesson(random_tokens(9, seed=4).tolist())], 0.1):
        assert not torch.equal(lm.model(tokens).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert torch.equal(lm.model(tokens).logits, logits)


def test_icl_against_finetuning(tokenizer, tmp_path):
    """Asked, finetuned and untrained with momentum; results without it are others."""
    texts = ("that is good", "that is bad", "a film", "bad film", "good", "that")
    films = [Example(i, (f"a film {text} is",), (" bad", " good"), i % 2) for i, text in enumerate(texts)]
    spec = dataclasses.replace(load_spec("mr", "code"), name="films")
    data = LabelledDataset(spec, films, films, {"kind": "local"})
    questions = classification.Settings(shots=(2,), seeds=(1,), batch_tokens=100)
    settings = study.Settings(questions, rates=(0.05,), controls=("untrained", "random", "lcgd"))
    found = []
    for eta in (None, 0.8):
        lm = HuggingFaceLM(random_model("llama"), tokenizer, "llama", "")
        if eta is not None:
            add_momentum(lm.model, eta)
            with pytest.raises(UserError, match=r"added_momentum_eta: null there, 0\.8 now"):
                study.analyse(lm, [data], settings, tmp_path / "None", show_progress=False)
        before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        study.analyse(lm, [data], settings, tmp_path / str(eta), show_progress=False)
        assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
        found.append(read(tmp_path / str(eta))["runs"][0])
        (line, *_) = (json.loads(line) for line in (tmp_path / str(eta) / "predictions.jsonl").read_text().splitlines())
        given, *both = lm.encode([films[0].inputs[0] + label for label in ("", " bad", " good")])
        assert line["setting"] == "zero_shot" and line["index"] == 0
        for score, ids in zip(line["scores"], both, strict=True):
            log_probs = lm.model(torch.tensor([ids])).logits[0, len(given) - 1 : -1].log_softmax(-1)
            assert score == pytest.approx(
                log_probs.gather(1, torch.tensor(ids[len(given) :])[:, None]).mean().item(), abs=1e-4
            )
    for part in (lambda run: run, lambda run: run["baselines"]["untrained"], lambda run: run["baselines"]["lcgd"]):
        without, with_momentum = (part(run)["corrected"] for run in found)
        assert with_momentum["simaou"] != pytest.approx(without["simaou"], rel=1e-3)
    corrected = [run["corrected"]["relaxation_cosine"] for run in found]
    assert corrected[0][0] == pytest.approx(corrected[1][0]) and corrected[0][1] != pytest.approx(
        corrected[1][1], rel=1e-3
    )


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "neox"])
def test_traces_have_momentum(family, prefix):
    """In the outputs, and unchanged in what they would be without softmax; the logits are attention's own."""
    model, tokens, positions = random_model(family), random_tokens(3, 9), torch.tensor([[8], [3], [5]])
    whole, cache = torch.cat([random_tokens(1, prefix, seed=5).expand(3, -1), tokens], 1), transformers.DynamicCache()
    plain, trace, outputs = AttentionTrace(positions, relax=True), AttentionTrace(positions, relax=True), []
    with torch.no_grad():
        with tracing(model, plain):
            model(whole, use_cache=False) if not prefix else None
        add_momentum(model, 0.7)
        implementation = model.config._attn_implementation
        if prefix:
            model(whole[:1, :prefix], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(3)
        with tracing(model, trace):
            traced = model(
                tokens, **({"past_key_values": cache, "use_cache": True} if prefix else {"use_cache": False})
            ).logits
        assert model.config._attn_implementation == implementation
        for module in attention_modules(model):
            module.register_forward_hook(lambda module, given, result: outputs.append(result[0]))
        close(traced, model(whole, use_cache=False).logits[:, prefix:], atol=1e-4, rtol=1e-4)
    rows = torch.arange(3)
    for i in range(2):
        close(trace.outputs[i][:, 0], outputs[i][rows, prefix + positions[:, 0]], atol=1e-5, rtol=1e-4)
    if not prefix:  # the first layer's inputs are the same
        close(trace.logits[0], plain.logits[0])
        assert (trace.outputs[0] - plain.outputs[0]).norm() > 0.1 * plain.outputs[0].norm()
        close(
            trace.relaxed_outputs[0] - plain.relaxed_outputs[0],
            trace.outputs[0] - plain.outputs[0],
            atol=1e-5,
            rtol=1e-4,
        )


def test_models_made_from_one_have_its_momentum_too(tokenizer):
    lm = HuggingFaceLM(random_model("llama"), tokenizer, "llama", "")
    before = lm.describe()
    add_momentum(lm.model, 0.7)
    about = json.loads(json.dumps(lm.describe()))
    added = {"added_momentum_eta": 0.7, "added_momentum_normalize": False, "added_momentum_gate": 1.0}
    assert about == before | {"architecture": before["architecture"] | added}
    fresh, again, tokens = untrained(lm).model, copy.deepcopy(lm.model), random_tokens(1, 9)
    logits = fresh(tokens).logits
    assert torch.equal(again(tokens).logits, lm.model(tokens).logits)
    add_momentum(lm.model, 0.7, gate=0.0)  # whose configuration the untrained one shares
    assert (fresh(tokens).logits - logits).abs().max() > 1e-3
    assert (again(tokens).logits - lm.model(tokens).logits).abs().max() > 1e-3


def test_a_saved_copy_and_another_attention_have_none(tokenizer, tmp_path):
    """Neither what the model computes, nor its traces and description."""
    plain, tokens = random_model("llama"), random_tokens(1, 9)
    model = copy.deepcopy(plain)
    add_momentum(model, 0.7)
    model.save_pretrained(tmp_path)
    assert "added" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for other in (model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
            with tracing(other, AttentionTrace(torch.tensor([[8]]))):
                close(other(tokens).logits, plain(tokens).logits)
            close(other(tokens).logits, plain(tokens).logits)
            assert not any(
                "added" in name for name in HuggingFaceLM(other, tokenizer, "llama", "").describe()["architecture"]
            )


def test_a_model_that_fails_keeps_its_attention(monkeypatch):
    model = random_model("llama")
    monkeypatch.setattr(model.model.norm, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_modules(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_have_momentum_is_refused(make_lm):
    from momentum_lm.formats.families import MOMENTUM
    from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig
    from momentum_lm.formats.remote.modeling_momentum_lm import MomentumLMForCausalLM

    xglm = transformers.XGLMConfig(vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    falcon = transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    decoder = make_lm().config
    ours = MomentumLMForCausalLM(MomentumLMConfig(**MOMENTUM.config(decoder, decoder.vocab_size)))
    other = "needs SDPA through transformers' attention interface, but the attention of {} is eager"
    for model, message in (
        (random_model(xglm), other.format("XGLMForCausalLM")),
        (random_model("llama", attn_implementation="eager"), other.format("LlamaForCausalLM")),
        (
            random_model(falcon),
            "FalconForCausalLM does not use transformers' attention interface, so momentum cannot be added",
        ),
        (ours, "MomentumLMForCausalLM has momentum of its own"),
    ):
        implementation, logits = model.config._attn_implementation, model(random_tokens(1, 5)).logits
        with pytest.raises(UserError, match=r"^eta") as caught:
            add_momentum(model, 0.5)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert model.config._attn_implementation == implementation and torch.equal(
            model(random_tokens(1, 5)).logits, logits
        )
    for eta in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=f"eta={eta}: the decay must lie strictly between 0 and 1"):
            add_momentum(random_model("llama"), eta)
    for given, message in (
        (dict(kind="multi_ema"), "kind='multi_ema': has weights that training must find; use ema or fir"),
        (dict(kind="none"), "kind='none': there is no such kind of momentum"),
        (dict(at="values"), "at='values': momentum is added to the output of somebody else's attention"),
        (dict(kind="fir", normalize=True), "normalize=True needs kind='ema', not fir"),
        (dict(kind="fir", taps=0), "taps=0: must be at least 1"),
    ):
        with pytest.raises(UserError) as caught:
            add_momentum(random_model("llama"), **given)
        assert str(caught.value).startswith(message)


# ---- the command line


@pytest.fixture(scope="module")
def command(tokenizer, tmp_path_factory):
    """command(task, results folder, *flags) of a small model and data set -> status."""
    folder = tmp_path_factory.mktemp("given")
    random_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "films.yaml").write_text(
        "description: made-up reviews\nfiles: {train: train.jsonl, evaluation: validation.jsonl}\nlabel: label\n"
        'labels: [bad, good]\ntemplates:\n  paper: "a film {text} is"\n'
    )
    for split in ("train", "validation"):
        rows = [
            {"text": text, "label": i % 2}
            for i, text in enumerate(("that is good", "that is bad", "a film", "bad", "good", "that"))
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(task, out, *flags):
        given = [
            "--hf-model",
            str(folder / "model"),
            "--datasets",
            str(folder / "films.yaml"),
            "--shots",
            "2",
            "--seeds",
            "1",
        ]
        return main(["--task", task, *given, "--device", "cpu", "--results-dir", str(out), *flags])

    return run


def test_an_evaluation_with_momentum_is_another_evaluation(command, tmp_path, capsys):
    for name, flags in (
        ("without", ()),
        ("weak", ("--hf-momentum-eta", "0.2")),
        ("strong", ("--hf-momentum-eta", "0.8")),
    ):
        assert command("icl_classification", tmp_path / name, *flags) == 0
        assert read(tmp_path / name)["model"]["architecture"].get("added_momentum_eta") == (
            float(flags[1]) if flags else None
        )
    lines = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("without", "weak", "strong")]
    assert len(set(lines)) == 3
    capsys.readouterr()
    for name, message in (
        ("weak", "added_momentum_eta: 0.2 there, 0.8 now"),
        ("without", "added_momentum_eta: null there, 0.8 now"),
    ):
        before = (tmp_path / name / "results.json").read_bytes()
        assert command("icl_classification", tmp_path / name, "--hf-momentum-eta", "0.8") == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / name / "results.json").read_bytes() == before
    assert command("icl_classification", tmp_path / "weak", "--hf-momentum-eta", "0.2") == 0
    assert (tmp_path / "weak" / "predictions.jsonl").read_text() == lines[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--hf-model", "nowhere", "--hf-momentum-eta", "1"],
            "--hf-momentum-eta 1: the decay must lie strictly between 0 and 1",
        ),
        (
            ["--hf-model", "nowhere", "--hf-momentum-eta", "nan"],
            "--hf-momentum-eta nan: the decay must lie strictly between 0 and 1",
        ),
        (
            ["--hf-model", "nowhere", "--hf-momentum-eta", "much"],
            "argument --hf-momentum-eta: invalid float value: 'much'",
        ),
        (
            ["--path", "nowhere.pt", "--hf-momentum-eta", "0.5"],
            "--hf-momentum-eta is for --hf-model; a checkpoint has the momentum",
        ),
    ],
)
def test_impossible_flags(flags, message, tmp_path, capsys):
    for task in ("icl_classification", "icl_finetune_analysis"):
        assert main(["--task", task, "--datasets", "mr", "--results-dir", str(tmp_path / "out"), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and not (tmp_path / "out").exists()

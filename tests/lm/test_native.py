"""Checkpoints of every form that fairseq has written, as tensors and options; real fairseq's are in
tests/cli/test_evaluate.py."""

import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.lm.native import load_native
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.filters import MomentumFilter, filter_names
from momentum_lm.studies.untrained import untrained

SHAPE = {"dim": 16, "ffn_dim": 24, "layers": 2, "heads": 4}
OURS = {
    "_name": "momentum_lm_tiny", "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2,
    "decoder_attention_heads": 4, "activation_fn": "gelu", "position": "sinusoidal", "momentum_kind": "ema",
    "dropout": 0.0, "momentum_eta": 0.7, "max_target_positions": 32, "tokens_per_sample": 32,
}  # fmt: skip
STOCK = {
    "arch": "transformer_lm_gpt", "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2,
    "decoder_attention_heads": 4, "activation_fn": "relu", "decoder_learned_pos": True,
    "decoder_normalize_before": True,
    "share_decoder_input_output_embed": True, "tokens_per_sample": 20, "max_target_positions": None,
    "decoder_input_dim": 16, "decoder_output_dim": 16,
}  # fmt: skip
TOKENS = torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(1))


def decoder(**changes):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(40, **{**SHAPE, **changes})).eval()
    for parameter in model.parameters():  # no bias or norm at its initial value: every tensor must count
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def weights(model):
    return {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}


def save(path, model=None, cfg=None, args=None, **more):
    state = {"args": args, "cfg": cfg, "model": weights(model) if model is not None else None} | more
    torch.save(state, path)
    return path


def assert_same(lm, model):
    with torch.no_grad():
        torch.testing.assert_close(lm.model(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_our_checkpoint(tmp_path):
    model = decoder(momentum_kind="ema", momentum_eta=0.7, max_positions=32)
    task = {"tokens_per_sample": 32, "packed_documents": True}
    lm = load_native(save(tmp_path / "c.pt", model, {"model": OURS, "task": task}))
    assert_same(lm, model)
    assert (lm.max_positions, lm.vocab_size, lm.packed_documents) == (32, 40, True)
    assert lm.config == model.config
    assert not lm.model.training
    assert lm.describe()["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(lm.sha256) == 64


@pytest.mark.parametrize("form", ["cfg is a dict", "model is a namespace", "args only"])
def test_stock_checkpoint(tmp_path, form):
    model = decoder(position="learned", activation="relu", max_positions=20)
    if form == "args only":
        path = save(tmp_path / "c.pt", model, args=argparse.Namespace(**STOCK, task="language_modeling"))
    else:
        options = STOCK if form == "cfg is a dict" else argparse.Namespace(**STOCK)
        path = save(tmp_path / "c.pt", model, {"model": options, "task": "language_modeling"})
    lm = load_native(path)
    assert_same(lm, model)
    assert lm.max_positions == 20


@pytest.mark.parametrize("tied", [True, False])
def test_old_tensor_names(tmp_path, tied):
    """Fused projections, no output projection or another name for it, a version and the position buffer."""
    model = decoder(tie_embeddings=tied)
    tensors = weights(model)
    for layer in range(2):
        for kind in ("weight", "bias"):
            names = [f"decoder.layers.{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            tensors[f"decoder.layers.{layer}.self_attn.in_proj_{kind}"] = torch.cat(
                [tensors.pop(name) for name in names]
            )
    output = tensors.pop("decoder.output_projection.weight")
    if not tied:
        tensors["decoder.embed_out"] = output
    tensors |= {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    options = STOCK | {"decoder_learned_pos": False, "activation_fn": "gelu", "share_decoder_input_output_embed": tied}
    torch.save({"args": argparse.Namespace(**options), "model": tensors}, tmp_path / "c.pt")
    assert_same(load_native(tmp_path / "c.pt"), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_positions": 2048},
        {"position": "learned", "max_positions": 50},
        {"tie_embeddings": False, "max_positions": 2048},
        {"momentum_kind": "ema", "momentum_learned": True, "momentum_gate": "zero", "max_positions": 2048},
        {"momentum_kind": "ema", "momentum_eta": 0.7, "max_positions": 2048},
        {"momentum_kind": "ema", "momentum_eta": 0.123456789, "momentum_normalize": True, "max_positions": 2048},
        {"momentum_kind": "ema", "momentum_eta": 0.999, "momentum_gate": "zero", "max_positions": 2048},
        {"momentum_kind": "ema", "momentum_learned": True, "momentum_normalize": True, "max_positions": 2048},
        {"momentum_kind": "multi_ema", "max_positions": 2048},
    ],
)
def test_shapes_from_tensors(tmp_path, changes):
    model = decoder(**changes)
    path = save(tmp_path / "model.pt", model)
    unseen = ("momentum_kind", "momentum_eta", "momentum_normalize")  # what tensors do not show of momentum
    options = {name: value for name, value in changes.items() if name in unseen}
    lm = load_native(tmp_path, overrides=str({"decoder_attention_heads": 4, **options}))
    assert_same(lm, model)
    assert lm.config == model.config
    if {"momentum_learned", "momentum_gate"} & changes.keys():
        assert load_native(path, options).config == lm.config  # momentum's parameters tell the heads
    else:
        with pytest.raises(UserError, match=r"model\.pt: .*decoder_attention_heads"):
            load_native(path, options)


@pytest.mark.parametrize("notes", [False, True])
@pytest.mark.parametrize("gate", ["none", "zero"])
def test_entries_that_checkpoints_once_had(tmp_path, notes, gate):
    """Decay and normalisation lay among the tensors: a model goes by its options, and a file without options is never
    one without momentum in silence.
    """
    changes = {"momentum_gate": gate, "momentum_normalize": True}
    model = decoder(momentum_kind="ema", momentum_eta=0.7, **changes)
    tensors, heads = weights(model), {"decoder_attention_heads": 4}
    for layer in range(2 * notes):
        prefix = f"decoder.layers.{layer}.self_attn.momentum"
        tensors |= {f"{prefix}.fixed_log_decay": torch.full((4,), -9.0), f"{prefix}.normalized": torch.ones(())}
    torch.save({"model": tensors, "cfg": {"model": OURS | changes}}, tmp_path / "with.pt")
    assert_same(load_native(tmp_path / "with.pt"), model)
    fresh = decoder(momentum_kind="ema", momentum_eta=0.7, **changes)
    fresh.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in tensors.items()})
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS), model(TOKENS))
    torch.save({"model": tensors}, tmp_path / "without.pt")
    if notes or gate == "zero":
        with pytest.raises(UserError, match=r"without\.pt: .*momentum_eta"):
            load_native(tmp_path / "without.pt", heads)
    unseen = {} if notes else {"momentum_kind": "ema", "momentum_normalize": True}
    assert_same(load_native(tmp_path / "without.pt", heads | unseen | {"momentum_eta": 0.7}), model)


def test_overrides_beat_the_checkpoint(tmp_path):
    model = decoder(momentum_kind="ema", momentum_eta=0.7)
    lm = load_native(save(tmp_path / "c.pt", model, {"model": OURS}), {"momentum_eta": 0.2, "max_target_positions": 9})
    assert (lm.config.momentum_eta, lm.max_positions) == (0.2, 9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [("{'a':", "is not a Python dict"), ("[1]", "is not a Python dict"), ("__import__('os')", "is not a Python dict"),
     ("{1: 2}", "is not a Python dict"), ("{'decoder_attention_head': 2}", "did you mean 'decoder_attention_heads'"),
     ("{'decoder_attention_heads': 5}", "multiple"), ("{'decoder_layers': 'x'}", r"c\.pt: decoder_layers='x': must be "
     "a whole number"),
     ("{'momentum_eta': 'a'}", "momentum_eta='a': must be a number"), ("{'decoder_embed_dim': "
     "[1]}", r"decoder_embed_dim=\[1\]"),
     ("{'max_target_positions': 1e999}", "max_target_positions=inf: must be a whole number")],
)  # fmt: skip
def test_bad_overrides(tmp_path, overrides, message):
    path = save(tmp_path / "c.pt", decoder(), {"model": OURS | {"momentum_kind": "none"}})
    with pytest.raises(UserError, match=message):
        load_native(path, overrides)


def test_what_is_no_tensor_is_named(tmp_path):
    torch.save({"model": weights(decoder()) | {"decoder.layers.0.fc1.bias": 3}}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"c\.pt: decoder\.layers\.0\.fc1\.bias is no tensor"):
        load_native(tmp_path / "c.pt")


def test_dtype_and_padding(tmp_path):
    model = decoder(momentum_kind="ema", momentum_learned=True)
    save(tmp_path / "checkpoint_last.pt", model.half(), {"model": OURS | {"momentum_learned": True}})
    assert load_native(tmp_path).dtype == torch.float32
    lm = load_native(tmp_path, dtype=torch.bfloat16)
    assert lm.dtype == torch.bfloat16
    assert lm.model.layers[0].self_attn.momentum.decay_logit.dtype == torch.float32
    rotary = OURS | {"position": "rotary", "momentum_kind": "none"}
    save(tmp_path / "rotary.pt", decoder(position="rotary"), {"model": rotary})
    assert load_native(tmp_path / "rotary.pt", dtype=torch.bfloat16).model.rotary.frequency.dtype == torch.float32
    inputs, targets = (
        torch.nn.functional.pad(TOKENS, (0, 3), value=1),
        torch.nn.functional.pad(TOKENS.roll(1, 1), (0, 3), value=1),
    )
    losses = lm.token_losses(inputs, targets)
    assert losses.dtype == torch.float32
    assert (losses[:, 12:] == 0).all()
    torch.testing.assert_close(losses[:, :12], lm.token_losses(inputs[:, :12], targets[:, :12]), rtol=0, atol=0.05)


def test_loading_leaves_the_random_generator_alone(tmp_path):
    path = save(tmp_path / "c.pt", decoder(momentum_kind="ema"), {"model": OURS})
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_native(path)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_the_optimizers_state_is_not_read(tmp_path):
    """Peak memory above the model's own: that of a checkpoint whose other parts are 200 MB."""
    path = save(
        tmp_path / "c.pt",
        decoder(momentum_kind="ema"),
        {"model": OURS},
        last_optimizer_state={"m": torch.ones(50_000_000)},
    )
    code = (
        "import re, sys; from momentum_lm.lm.native import load_native\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "load_native(sys.argv[1]); before = peak(); load_native(sys.argv[2]); print(peak() - before)"
    )
    small = save(tmp_path / "small.pt", decoder(momentum_kind="ema"), {"model": OURS})
    done = subprocess.run([sys.executable, "-c", code, small, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # of 200,000 kB


def missing(model):
    return {name: tensor for name, tensor in weights(model).items() if "layers.1.fc2" not in name}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (missing, {}, r"lacks layers\.1\.fc2\.bias and 1 more"),
        (lambda m: weights(m) | {"decoder.odd": torch.zeros(1)}, {}, "has odd, which the decoder does not"),
        (
            lambda m: weights(m) | {"encoder.x": torch.zeros(1)},
            {},
            r"more than a decoder-only language model, such as encoder\.x",
        ),
        (lambda m: {"encoder.x": torch.zeros(1)}, {}, "no decoder-only language model"),
        (weights, {"decoder_ffn_embed_dim": 32}, r"fc1\.weight is \(24, 16\) in the checkpoint, \(32, 16\)"),
        (
            lambda m: weights(m) | {"decoder.output_projection.weight": torch.zeros(40, 16)},
            {},
            "output projection differs",
        ),
        (weights, {"adaptive_softmax_cutoff": "5,10"}, "adaptive_softmax_cutoff"),
        (weights, {"decoder_normalize_before": False}, "normalises after"),
        (weights, {"character_embeddings": True}, "character_embeddings"),
        (weights, {"momentum_kind": "sgd"}, "momentum_kind"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(tmp_path, tensors, options, message):
    torch.save(
        {"cfg": {"model": OURS | {"momentum_kind": "none"} | options}, "model": tensors(decoder())}, tmp_path / "c.pt"
    )
    with pytest.raises(UserError, match=message) as error:
        load_native(tmp_path / "c.pt")
    assert "c.pt" in str(error.value)


def test_missing_and_torn_files(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_native(tmp_path)
    with pytest.raises(UserError, match=r"absent\.pt"):
        load_native(tmp_path / "absent.pt")
    path = save(tmp_path / "c.pt", decoder(), {"model": OURS | {"momentum_kind": "none"}})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"c\.pt"):
        load_native(path)


class Unknown:
    pass


def test_code_in_a_checkpoint_is_refused_unless_trusted(tmp_path):
    path = save(tmp_path / "c.pt", decoder(), {"model": OURS | {"momentum_kind": "none"}}, extra_state=Unknown())
    with pytest.raises(UserError, match="trust=True"):
        load_native(path)
    assert load_native(path, trust=True).vocab_size == 40


def test_stock_model_without_options_of_ours_is_not_taken_for_ours(tmp_path):
    """A stock checkpoint with tied names but another position scheme fails loudly, not with other numbers."""
    model = decoder(position="learned", max_positions=20)
    path = save(tmp_path / "c.pt", model, {"model": STOCK | {"decoder_learned_pos": False}})
    with pytest.raises(UserError, match=r"has embed_positions\.weight"):
        load_native(path)


def replaced(**entries):
    """Makes a function of a model: its tensors, with these, by name with __ for a dot and without ``decoder.``."""
    return lambda model: (
        weights(model) | {f"decoder.{name.replace('__', '.')}": value for name, value in entries.items()}
    )


def state(tensors=weights, model=None, **entries):
    """Makes a function of nothing: a checkpoint that is odd in one respect."""
    options = OURS | {"momentum_kind": "none"} | (model if isinstance(model, dict) else {})
    return lambda: (
        {"cfg": {"model": options if model is None or isinstance(model, dict) else model}, "model": tensors(decoder())}
        | entries
    )


def deep(levels):
    return {"a": deep(levels - 1)} if levels else {}


ODD = {
    "options that are a number": (state(model=5), "its cfg.model is of type int, not a dict of options"),
    "options that are a list": (state(model=[1, 2]), "its cfg.model is of type list, not options"),
    "options with numbers for names": (state(model={1: 2}), "its cfg.model is of type dict, not a dict of options"),
    "configuration that is a text": (state(cfg="a: 1"), "its cfg is of type str, not a dict"),
    "arguments that are a dict": (state(args={"a": 1}), "its args are of type dict, not a namespace"),
    "an option that looks elsewhere": (state(model={"data": "${oc.env:HOME}"}),
    r"option cfg\.model\.data refers to something else"),
    "an option that is a tensor": (state(model={"dropout": torch.ones(1)}), r"option cfg\.model\.dropout is a tensor"),
    "an option of many digits": (state(model={"decoder_layers": 10**300}),
    r"option cfg\.model\.decoder_layers is a number of 997 bits"),
    "a long option": (state(model={"x": "a" * 200_000}), r"option cfg\.model\.x has 200,000 characters"),
    "deep options": (state(model={"x": deep(40)}), "options lie in one another"),
    "many options": (state(model={"x": [[0] * 1000 for _ in range(200)]}), "has more than 100,000 options"),
    "10**9 layers": (state(model={"decoder_layers": 10**9}), "decoder_layers=1000000000: must be at most 10,000"),
    "other layers": (state(model={"decoder_layers": 9999}), "2 layers in the checkpoint, 9999 by the architecture"),
    "no layers": (state(model={"decoder_layers": 0}), "decoder_layers=0: must be at least 1"),
    "minus one layer": (state(model={"decoder_layers": -1}), "decoder_layers=-1: must be at least 1"),
    "half a layer": (state(model={"decoder_layers": 2.5}), r"decoder_layers=2\.5: must be a whole number"),
    "layers that are true": (state(model={"decoder_layers": True}), "decoder_layers=True: must be a whole number"),
    "a huge width": (state(model={"decoder_embed_dim": 1 << 20, "decoder_attention_heads": 1}),
    r"embed_tokens\.weight is \(40, 16\) in the"),
    "huge feed-forward layers": (state(model={"decoder_ffn_embed_dim": 1 << 24}),
    r"fc1\.weight is \(24, 16\) in the checkpoint"),
    "positions without end": (state(model={"max_target_positions": 10**15}),
    "max_target_positions=1000000000000000: must be at most"),
    "NaN positions": (state(model={"max_target_positions": float("nan")}),
    "max_target_positions=nan: must be a whole number"),
    "NaN for the decay": (state(model={"momentum_kind": "ema", "momentum_eta": float("nan")}), "momentum_eta=nan"),
    "a dropout of two": (state(model={"dropout": 2.0}), r"dropout=2\.0: must be a probability"),
    "a word for a switch": (state(model={"untie_embeddings": "False"}),
    "untie_embeddings='False': must be True or False"),
    "a list for a word": (state(model={"position": ["rotary"]}), r"position=\['rotary'\]: must be a word"),
    "a long word": (state(model={"activation_fn": "x" * 9000}), "activation_fn='xxx.*…: must be a word"),
    "absent tokens of many digits": (state(model={"absent_tokens": "9" * 9000}),
    "absent_tokens='999.*…: must be token ids"),
    "a task's switch that is none": (state(cfg={"model": OURS | {"momentum_kind": "none"},
        "task": {"packed_documents": "no"}}),
                                     "its option packed_documents is 'no', not true or false"),
    "a model that is a list": (state(tensors=lambda m: [1]), "its model is of type list, not a dict of tensors"),
    "a number for a name": (state(tensors=lambda m: weights(m) | {5: torch.zeros(1)}),
    "its model has a name of type int"),
    "an integer matrix": (state(tensors=replaced(layers__0__fc1__weight=torch.ones(24, 16, dtype=torch.int8))),
    "fc1.weight is of int8"),
    "a complex embedding": (state(tensors=replaced(embed_tokens__weight=torch.ones(40, 16, dtype=torch.complex64))),
    "is of complex64"),
    "a truth-valued embedding": (state(tensors=replaced(embed_tokens__weight=torch.ones(40, 16) > 0)),
    "is of bool, and weights are"),
    "a number for an embedding": (state(tensors=replaced(embed_tokens__weight=torch.tensor(1.0))),
    r"is \(\), which is no matrix"),
    "a vector for an embedding": (state(tensors=replaced(embed_tokens__weight=torch.ones(40))),
    r"is \(40,\), which is no matrix"),
    "an embedding without rows": (state(tensors=replaced(embed_tokens__weight=torch.ones(0, 16))),
    "a dictionary of 0 entries lacks"),
    "queries, keys and values that are not three": (
        state(tensors=replaced(layers__0__self_attn__in_proj_weight=torch.ones(2, 8))),
            r"in_proj_weight is \(2, 8\), which is not"),
    "queries under two names": (
        state(tensors=replaced(layers__0__self_attn__in_proj_weight=torch.ones(48, 16))),
            r"self_attn\.[kqv]_proj\.weight twice, under an old"),
    "an output projection under two names": (state(tensors=replaced(embed_out=torch.ones(40, 16))),
    r"output_projection\.weight twice"),
    "a layer of 5000 digits": (
        state(tensors=lambda m: weights(m) | {f"decoder.layers.{'9' * 5000}.fc1.weight": torch.ones(2, 8)}),
            r"has layers\.9+…, which the"),
    "names with control characters": (state(tensors=replaced(**{"a\x1b[31m": torch.ones(1)})),
    r"has a\?\[31m, which the decoder does not"),
    "one tensor for all layers": (state(model={"decoder_layers": 40}, tensors=lambda m: weights(m) | {
        name.replace("layers.0", f"layers.{i}"): tensor for i in range(40) for name,
            tensor in weights(m).items() if "layers.0" in name}),
        "are the same under several names"),
    "metadata that is a list": (state(fsdp_metadata=[1]), "its fsdp_metadata is of type list, not a dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_checkpoints_are_refused_in_one_line(case, tmp_path):
    make, message = ODD[case]
    torch.save(make(), tmp_path / "c.pt")
    with pytest.raises(UserError, match=message) as error:
        load_native(tmp_path / "c.pt")
    assert "c.pt: " in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_tokens.weight": torch.zeros(0)}, "no matrix of embeddings"),
        ({"embed_tokens.weight": torch.zeros(8, 8)}, "number of heads"),
        ({"embed_positions.weight": torch.tensor(1.0)}, "embed_positions.weight is a single number"),
        ({"layers.0.fc1.weight": torch.tensor(1.0)}, "fc1.weight is a single number"),
        ({"layers.0.self_attn.momentum.gate": torch.tensor(0.0)}, "number of heads"),
    ],
)
def test_odd_tensors_without_options(changes, message, tmp_path):
    tensors = {
        f"decoder.{name}": tensor for name, tensor in ({"embed_tokens.weight": torch.zeros(40, 16)} | changes).items()
    }
    torch.save({"model": tensors}, tmp_path / "c.pt")
    with pytest.raises(UserError, match=message):
        load_native(tmp_path / "c.pt")


def test_the_data_that_a_checkpoint_names_need_not_be_a_path(tmp_path):
    for data in (5, "a\0b", [], ["nowhere", 3], None, "x" * 9000, {"a": 1}):
        task = {"tokens_per_sample": 32, "data": data}
        assert load_native(
            save(tmp_path / "c.pt", decoder(momentum_kind="ema", momentum_eta=0.7), {"model": OURS, "task": task})
        ).bos


@pytest.mark.parametrize("kind", ["ema", "fir", "multi_ema"])
@pytest.mark.parametrize(
    "at", ["output", "queries,keys,values", "input,ffn,ffn_hidden", "embedding,output", "depth,values"]
)
def test_without_momentum_is_the_decoder_without_filters(tmp_path, kind, at):
    if kind != "ema" and "depth" in at:
        at = at.replace("depth,", "")
    shape = dict(max_positions=32, position="rotary", layers=3)
    model = decoder(momentum_kind=kind, momentum_at=at, momentum_eta=0.7, **shape)
    options = OURS | {"momentum_kind": kind, "momentum_at": at, "position": "rotary", "decoder_layers": 3}
    path = save(tmp_path / "c.pt", model, {"model": options, "task": {}})
    plain = decoder(**shape)
    own = set(plain.state_dict())
    plain.load_state_dict({name: part for name, part in model.state_dict().items() if name in own})
    lm, whole = load_native(path), load_native(path)
    lm.remove_momentum("all")
    assert_same(lm, plain)
    assert lm.describe()["architecture"] == whole.describe()["architecture"] | {
        "without_momentum": sorted(filter_names(model))
    }
    assert_same(whole, model)
    assert not filter_names(untrained(lm).model) and filter_names(untrained(whole).model) == filter_names(model)

    some = load_native(path)
    some.remove_momentum([2, 1, 1])
    taken = [name for name in filter_names(model) if name.startswith(("layers.1.", "layers.2."))]
    assert some.describe()["architecture"]["without_momentum"] == sorted(taken)
    again = load_native(path)
    for layer in (np.int64(2), 1):
        again.remove_momentum([layer])
    assert again.describe() == some.describe()
    assert filter_names(untrained(some).model) == filter_names(some.model)
    for name, module in model.named_modules():  # the same by hand: what a filter of these layers gives is nothing
        if isinstance(module, MomentumFilter) and name.startswith(("layers.1.", "layers.2.")):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, None)
    assert_same(some, model)
    with torch.no_grad():
        assert not torch.equal(some.model(TOKENS), plain(TOKENS)) and not torch.equal(
            some.model(TOKENS), whole.model(TOKENS)
        )
    state = some.start(TOKENS[0, :7].tolist())
    cached = some.model.features(TOKENS[:1, 7:], state)
    torch.testing.assert_close(cached, some.model.features(TOKENS[:1])[:, 7:], rtol=1e-5, atol=1e-5)


def test_what_has_no_momentum_is_refused(tmp_path):
    def loaded(name, **changes):
        options = OURS | {"momentum_kind": "none", **changes}
        model = decoder(max_positions=32, **changes)
        return load_native(save(tmp_path / name, model, {"model": options, "task": {}}))

    lm, smear = loaded("c.pt", momentum_kind="ema"), loaded("e.pt", momentum_kind="fir", momentum_at="embedding")
    for which, layers, message in (
        (lm, [2], r"without_momentum=\[2\]: .* has the layers 0 to 1"),
        (lm, [0, -1], "has the layers 0 to 1"),
        (lm, "none", "without_momentum='none': give layers, counted from 0, or all"),
        (lm, [], r"without_momentum=\[\]: give layers, counted from 0, or all"),
        (smear, [0], r"layer 0 of .* has no filter; its filter is at the embedding, which all takes out"),
        (loaded("v.pt"), "all", "has no momentum"),
    ):
        with pytest.raises(UserError, match=message):
            which.remove_momentum(layers)
        assert "without_momentum" not in which.describe()["architecture"]
    lm.remove_momentum([1])
    with pytest.raises(UserError, match=r"layer 1 of .* has no filter; layers 0 have"):
        lm.remove_momentum([0, 1])
    smear.remove_momentum("all")
    assert smear.describe()["architecture"]["without_momentum"] == ["momentum_embedding"]

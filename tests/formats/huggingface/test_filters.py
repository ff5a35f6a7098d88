"""Exported models with every kind of filter, wherever one may be, against our own decoder with the same weights."""

import dataclasses
import importlib
import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from momentum_lm.errors import UserError  # noqa: E402
from momentum_lm.formats.families import MOMENTUM  # noqa: E402
from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig  # noqa: E402
from momentum_lm.formats.remote.modeling_momentum_lm import CHUNK, MomentumLMForCausalLM  # noqa: E402
from momentum_lm.formats.to_huggingface import choose  # noqa: E402
from momentum_lm.lm.huggingface import HuggingFaceLM  # noqa: E402
from momentum_lm.model import Decoder, DecoderConfig, WindowFilter, register_filter  # noqa: E402
from momentum_lm.model.config import PLACES  # noqa: E402

from .test_remote import (  # noqa: E402
    LLAMA,
    OTHERS,
    PAD,
    SHAPE,
    check_program,
    configuration,
    exported,
    left_padded,
    pair,
    random_tokens,
)
from .test_round_trip import save_ours  # noqa: E402

KINDS = {
    "ema": dict(momentum_kind="ema", momentum_eta=0.6, momentum_normalize=True),
    "ema_learned": dict(momentum_kind="ema", momentum_learned=True, momentum_gate="zero"),
    "multi_ema": dict(momentum_kind="multi_ema", momentum_gate="zero"),
    "fir": dict(momentum_kind="fir"),
    "fir_current": dict(momentum_kind="fir", momentum_taps=5, momentum_current=True, momentum_gate="zero"),
}
ALL = {kind: ",".join(PLACES if kind.startswith("ema") else PLACES[:-1]) for kind in KINDS}
EACH = [(kind, place) for kind in KINDS for place in ALL[kind].split(",")]
EVERYWHERE = [*ALL.items()]
SOME = [("ema_learned", "embedding,depth"), ("multi_ema", "values"), ("fir_current", "embedding,ffn_hidden")]
close = torch.testing.assert_close


def at(kind, places, **changes):
    """Our decoder and the exported model: heads share values, and the width is no multiple of the heads."""
    return pair(**KINDS[kind], momentum_at=places, **{**LLAMA, "dim": 30, "layers": 2, **changes})


@pytest.mark.parametrize("kind, places", EACH + EVERYWHERE)
def test_logits_are_those_of_the_decoder(kind, places):
    """Of whole rows, through a cache, padded on the left and between calls, and packed."""
    decoder, model = at(kind, places)
    rows, tokens, mask = left_padded([CHUNK + 9, 1, 33])
    expected = [decoder(row[None])[0] for row in rows]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        for found, row in zip(logits, expected, strict=True):
            close(found[-len(row) :], row, atol=1e-5, rtol=1e-5)
    cache, start = None, 0
    for step in (20, 1, 1, 9, 10):
        seen = slice(start, start + step)
        found = model(tokens[:, seen], attention_mask=mask[:, : start + step], past_key_values=cache, use_cache=True)
        cache, start = found.past_key_values, start + step
        close(found.logits[mask[:, seen].bool()], logits[:, seen][mask[:, seen].bool()], atol=1e-5, rtol=1e-5)
    more, others, other_mask = left_padded([2, 5, 4], seed=9)
    logits = model(others, attention_mask=torch.cat([mask, other_mask], 1), past_key_values=cache).logits
    for found, row, then in zip(logits, rows, more, strict=True):
        whole = decoder(torch.cat([row, then])[None])[0, len(row) :]
        close(found[-len(then) :], whole, atol=1e-5, rtol=1e-5)

    documents = torch.cat([torch.full((length,), i) for i, length in enumerate((5, 1, CHUNK + 3, 2, 20))])
    positions = torch.cat([torch.arange(length) for length in (5, 1, CHUNK + 3, 2, 20)])[None]
    packed = random_tokens(1, len(documents))
    close(
        model(packed, position_ids=positions).logits, decoder(packed, segment_ids=documents[None]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind, places", SOME)
@pytest.mark.parametrize("other", OTHERS)
def test_with_other_choices_of_the_decoder(kind, places, other):
    decoder, model = pair(**KINDS[kind], momentum_at=places, **OTHERS[other])
    tokens = random_tokens(2, CHUNK + 5)
    close(model(tokens).logits, decoder(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, places", EACH + EVERYWHERE)
def test_generation(kind, places):
    """Greedy and with beams, in a padded batch: with a cache, without, and with one of fixed size; greedy also as our
    decoder does it, from its own cache.
    """
    decoder, model = at(kind, places)
    _, tokens, mask = left_padded([7, 3])
    for beams in (1, 2):
        settings = dict(
            attention_mask=mask, num_beams=beams, do_sample=False, max_new_tokens=12, min_new_tokens=12,
            suppress_tokens=[PAD],
        )  # fmt: skip
        found = model.generate(tokens, **settings)
        assert torch.equal(model.generate(tokens, use_cache=False, **settings), found)
        if beams == 1:
            assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), found)
            cache, step = decoder.new_cache(), tokens
            for expected in found[:, tokens.shape[1] :].unbind(1):
                logits = decoder(step, cache)[:, -1].index_fill(-1, torch.tensor([PAD, 2]), -torch.inf)
                step = logits.argmax(-1, keepdim=True)
                assert torch.equal(step[:, 0], expected)


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_a_cropped_and_a_repeated_cache(kind, places):
    """Also one that is made without the configuration."""
    decoder, model = at(kind, places)
    tokens, more = random_tokens(1, 20), random_tokens(3, 4, seed=7)
    expected = decoder(torch.cat([tokens[:, :14].expand(3, -1), more], 1))[:, 14:]
    for cache in (transformers.DynamicCache(config=model.config), transformers.DynamicCache()):
        model(tokens, past_key_values=cache)
        cache.crop(-6)
        cache.batch_repeat_interleave(3)
        close(model(more, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    row = torch.cat([tokens[:, :14], more[:1]], 1)
    found = [model(part, past_key_values=cache).logits for part in row.split([8, 1, 9], dim=1)]
    close(torch.cat(found, 1), decoder(row), atol=1e-5, rtol=1e-5)
    cache.reset()
    close(model(row, past_key_values=cache).logits, decoder(row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_masks_of_who_sees_whom(kind, places):
    _, model = at(kind, places)
    _, tokens, mask = left_padded([21, 12])
    expected = model(tokens, attention_mask=mask).logits[mask.bool()]
    sees = torch.ones(21, 21, dtype=torch.bool).tril() & mask.bool()[:, None, None] | torch.eye(21, dtype=torch.bool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(
        model(tokens, attention_mask=sees, position_ids=positions).logits[mask.bool()], expected, atol=2e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"each of 4 heads sees, and momentum_at=values filters.*\(B, 1, T, S\)"):
        model(tokens, attention_mask=sees.expand(-1, 4, -1, -1))


def test_a_filter_of_the_output_with_masks_of_each_head():
    """As if each head of values were there once for every query head."""
    shared, several = (pair(**KINDS["fir_current"], **LLAMA | {"kv_heads": count})[1] for count in (2, 4))
    state = several.state_dict()
    for name, tensor in shared.state_dict().items():
        if tensor.shape != state[name].shape:
            dim = 1 if name.endswith("momentum.weights") else 0
            count = 2 if ".momentum." in name else tensor.shape[0] // 2
            heads = tensor.unflatten(dim, (2, -1)) if count != 2 else tensor
            tensor = heads.repeat_interleave(2, dim=dim).reshape(state[name].shape)
        state[name] = tensor
    several.load_state_dict(state)
    sees = torch.rand(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    sees = sees.tril() | torch.eye(20, dtype=torch.bool)
    tokens = random_tokens(2, 20)
    found, expected = (model(tokens, attention_mask=sees).logits for model in (shared, several))
    close(found, expected, atol=2e-5, rtol=1e-5)
    assert (expected - several(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_documents_are_apart_to_the_last_bit(kind, places):
    _, model = at(kind, places)
    positions = torch.cat([torch.arange(30), torch.arange(15)])[None]
    tokens = random_tokens(1, 45)
    others = torch.cat([random_tokens(1, 30, seed=5), tokens[:, 30:]], 1)
    found, expected = (model(x, position_ids=positions).logits[:, 30:] for x in (others, tokens))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_training(kind, places):
    """Loss and gradients, with and without recomputed activations, are those of the decoder."""
    decoder = at(kind, places)[0].train().requires_grad_(True)
    tokens = random_tokens(2, CHUNK + 5)
    decoder.loss(tokens[:, :-1], tokens[:, 1:]).div(2 * (CHUNK + 4)).backward()
    for reentrant in (None, False, True):
        model = exported(decoder).train().requires_grad_(True)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        for name, parameter in decoder.named_parameters():
            theirs = model.get_parameter("lm_head.weight" if name == "output_projection.weight" else f"model.{name}")
            close(theirs.grad, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_half_precision(kind, places, tmp_path):
    """Filters stay in fp32, also where weights are loaded into a model in half precision."""
    decoder, model = at(kind, places, layers=1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "momentum" in name:
                parameter.mul_(0.3)
    model = exported(decoder)
    model.save_pretrained(tmp_path)
    half = MomentumLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if ".momentum" in name else torch.bfloat16), name
        assert ".momentum" not in name or torch.equal(parameter, model.get_parameter(name)), name
    ours = Decoder(decoder.config).eval()
    ours.load_state_dict(decoder.state_dict())
    ours.bfloat16()
    tokens = random_tokens(4, 40)
    expected = model(tokens).logits
    error, our_error = ((x.float() - expected).norm() for x in (half(tokens).logits, ours(tokens).detach()))
    assert error < 1.3 * our_error and our_error < 0.2 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(tokens).logits.float() - expected).norm() < 1.3 * our_error


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_a_new_model_starts_as_ours_does(kind, places):
    """With a gate of 0 as one without momentum; parameters that are not drawn are the same."""
    config = DecoderConfig(**{**SHAPE, **KINDS[kind], "momentum_at": places})
    ours, model = Decoder(config), MomentumLMForCausalLM(configuration(config)).eval()
    filters = {name: parameter for name, parameter in ours.named_parameters() if "momentum" in name}
    assert filters.keys() == {n.removeprefix("model.") for n, _ in model.named_parameters() if "momentum" in n}
    for name, parameter in filters.items():
        if not name.endswith((".delta", ".gamma")):
            assert torch.equal(model.get_parameter(f"model.{name}"), parameter), name
    if config.momentum_gate == "zero" and kind != "ema_learned":
        vanilla = MomentumLMForCausalLM(configuration(DecoderConfig(**SHAPE))).eval()
        state = {name: tensor for name, tensor in model.state_dict().items() if ".momentum" not in name}
        vanilla.load_state_dict(state)
        tokens = random_tokens(1, 9)
        assert torch.equal(model(tokens).logits, vanilla(tokens).logits)


@pytest.mark.parametrize("kind, places", EACH + EVERYWHERE)
def test_conversion_there_and_back(kind, places, convert, tmp_path, tokenizer_folder):
    model = save_ours(tmp_path / "ours", tokenizer_folder, **KINDS[kind], momentum_at=places)
    assert "MomentumLMForCausalLM" in convert(tmp_path / "ours", tmp_path / "theirs")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = random_tokens(2, 10)
    with torch.no_grad():
        close(loaded.eval()(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)
    convert(tmp_path / "theirs", tmp_path / "again")
    first = torch.load(tmp_path / "ours" / "checkpoint_best.pt", weights_only=True)
    second = torch.load(tmp_path / "again" / "model.pt", weights_only=True)
    assert first["cfg"] == second["cfg"]
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())


def test_configurations_go_both_ways():
    config = DecoderConfig(
        **SHAPE, momentum_kind="fir", momentum_at="ffn, values", momentum_taps=4, momentum_current=True
    )
    theirs = MomentumLMConfig(**json.loads(json.dumps(MOMENTUM.config(config, config.vocab_size))))
    assert theirs.places == theirs.over_tokens == config.places == ("values", "ffn")
    assert MOMENTUM.decoder_config(theirs.to_dict(), config.vocab_size) == config
    theirs = MomentumLMConfig(momentum_kind="ema", momentum_at="output,depth")
    assert theirs.places == ("output", "depth") and theirs.over_tokens == ("output",)


def test_a_kind_of_ones_own_whose_code_cannot_go_along(tmp_path, monkeypatch):
    class Nested(WindowFilter):
        pass

    register_filter("nested")(Nested)
    config = DecoderConfig(**SHAPE, momentum_kind="nested")
    with pytest.raises(
        UserError, match=r"momentum_kind='nested' cannot be written for .* its class must stand in a file"
    ):
        choose(config, None, None, 2)
    for line, allowed in (("from .beside import x", False), ("import math", True)):
        (tmp_path / f"filter_{allowed}.py").write_text(
            f"{line}\nfrom momentum_lm.model import WindowFilter, register_filter\n"
            f"@register_filter('of_file_{allowed}')\nclass Kind(WindowFilter):\n    pass\n"
        )
    (tmp_path / "beside.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path.parent)
    for allowed in (True, False):
        importlib.import_module(f"{tmp_path.name}.filter_{allowed}")
        config = DecoderConfig(**SHAPE, momentum_kind=f"of_file_{allowed}")
        if allowed:
            assert choose(config, None, None, 2) == (MOMENTUM, None)
        else:
            with pytest.raises(UserError, match=r"filter_False.py imports files beside it, and goes alone"):
                choose(config, None, None, 2)


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_exported(kind, places):
    check_program(at(kind, places, layers=1)[1])


@pytest.mark.nightly
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind, places", SOME)
def test_exported_with_rows_of_any_length(kind, places, strict):
    _, model = at(kind, places)
    _, tokens, mask = left_padded([50, 43])
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("length", min=2, max=150)
    packed = torch.cat([torch.arange(30), torch.arange(20)])[None].repeat(2, 1)
    for name, given in (("attention_mask", mask), ("position_ids", packed)):
        shapes = {"input_ids": {0: rows, 1: length}, name: {0: rows, 1: length}, "use_cache": None}
        arguments = {"input_ids": tokens, name: given, "use_cache": False}
        graph = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=strict)
        for size in (33, 128, 5):
            others, seen = random_tokens(3, size), torch.ones(3, size, dtype=torch.bool)
            if name == "attention_mask":
                seen[1, :3] = False
            value = seen.long() if name == "attention_mask" else torch.arange(size)[None].repeat(3, 1) % 30
            found = graph.module()(input_ids=others, **{name: value}, use_cache=False).logits
            close(found[seen], model(others, **{name: value}).logits[seen], atol=2e-5, rtol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("kind, places", SOME)
def test_compiled_in_one_graph(kind, places):
    _, model = at(kind, places)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    _, tokens, mask = left_padded([41, 30])
    found = compiled(tokens, attention_mask=mask, use_cache=False).logits
    close(found, model(tokens, attention_mask=mask).logits, atol=2e-5, rtol=1e-5)
    positions = torch.cat([torch.arange(25), torch.arange(16)])[None].repeat(2, 1)
    found = compiled(tokens, position_ids=positions, use_cache=False).logits
    close(found, model(tokens, position_ids=positions).logits, atol=2e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("kind, places", EVERYWHERE)
def test_prefixes_that_rows_share(kind, places):
    """As evaluation and generation read exported models."""
    model = at(kind, places)[1]
    lm = HuggingFaceLM(model, object(), "model", "")
    prefix, rows = random_tokens(1, 20)[0], random_tokens(3, 6)
    place, last = torch.arange(3), torch.full((3,), 5)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    assert lm.shares_prefixes and lm._stepping == "shared"
    found, _ = lm.log_probs(rows, padding, place, last, place + 4, lm.start(prefix.tolist()))
    logits = model(torch.cat([prefix.expand(3, -1), rows], 1), use_cache=False).logits[:, -1]
    close(found, logits.log_softmax(-1)[place, place + 4], atol=2e-5, rtol=0)
    state = lm.start(prefix.tolist()).rows(3)
    stepped, _ = lm.step(rows, padding, state)
    close(stepped, logits, atol=2e-5, rtol=1e-5)


def test_fewer_layers_of_a_saved_model(tmp_path):
    """As ``num_hidden_layers`` makes them."""
    _, model = at("ema_learned", ALL["ema_learned"])
    model.save_pretrained(tmp_path)
    short = MomentumLMForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1).eval()
    config = dataclasses.replace(MOMENTUM.decoder_config(model.config.to_dict(), model.config.vocab_size), layers=1)
    ours = Decoder(config).eval()
    state = {name.removeprefix("model."): tensor for name, tensor in short.state_dict().items()}
    state["output_projection.weight"] = state.pop("lm_head.weight")
    ours.load_state_dict(state)
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        close(short(tokens).logits, ours(tokens), atol=1e-5, rtol=1e-5)

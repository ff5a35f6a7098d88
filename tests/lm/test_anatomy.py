"""Every family's entry against what a tiny random model of it computes: which norm feeds what, and which numbers are
whose."""

import copy
import gc
import importlib.util
import weakref
from pathlib import Path

import pytest
import torch

from momentum_lm.lm import tracing
from momentum_lm.lm.anatomy import FAMILIES, anatomy, key_value_weights, logits_of, untrained_copy

close = torch.testing.assert_close
TOKENS = torch.arange(20, 29)[None]
SEPARATE = (
    "bloom",
    "falcon",
    "gpt_neo",
    "gptj",
    "mpt",
    "xglm",
)  # attention that does not go through transformers' interface
SCALED = ("gpt_oss", "phi3")  # rotary positions that scale keys too


@pytest.fixture(scope="module")
def tiny():
    """tiny(family, **changes of its configuration) -> a random model."""
    transformers = pytest.importorskip("transformers")
    path = Path(__file__).with_name("causal_models.py")
    spec = importlib.util.spec_from_file_location("causal_models", path)
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield models.tiny
    transformers.logging.set_verbosity(before)


def calls(model, **options):
    """What each module of a model was given first and gave, and the result of the call."""
    given, gave, handles = {}, {}, []

    def keep(module, args, kwargs, result):
        first = args[0] if args else kwargs.get("hidden_states")
        given.setdefault(module, first)
        gave.setdefault(module, result[0] if isinstance(result, tuple) else result)

    for module in model.modules():
        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        result = model(TOKENS, **options)
    for handle in handles:
        handle.remove()
    return given, gave, result


def check_parts(parts, heads, kv_heads, activation, final, adds_residual=False):
    """Of every layer; final: what the unembedding is given."""
    given, gave, _ = final
    close(given[parts.unembedding], gave[parts.final_norm])
    for layer in parts.layers:
        assert (layer.heads, layer.kv_heads) == (heads, kv_heads)
        for projection, count in ((layer.query, heads), (layer.key, kv_heads), (layer.value, kv_heads)):
            assert projection.weight.shape == (count * layer.head_dim, given[projection.module].shape[-1])
            found = torch.nn.functional.linear(given[projection.module], projection.weight, projection.bias)
            close(projection.of(gave[projection.module]), found, atol=1e-4, rtol=1e-4)
            mask = projection.mask(projection.module.weight)
            assert mask is None or mask.sum() == projection.weight.numel()
        if not adds_residual:
            close(gave[layer.output.module].view_as(gave[layer.attention]), gave[layer.attention])
        for norm, module in (
            (layer.attention_norm, layer.query.module),
            (layer.ffn_norm, layer.ffn_in and layer.ffn_in.module),
        ):
            if norm is not None and module is not None:
                close(gave[norm].view_as(given[module]), given[module])
        if layer.ffn_in is not None:
            inner = layer.ffn_in.of(gave[layer.ffn_in.module])
            inner = (
                activation(inner)
                if layer.ffn_gate is None
                else activation(layer.ffn_gate.of(gave[layer.ffn_gate.module])) * inner
            )
            close(given[layer.ffn_out.module].view_as(inner), inner, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"momentum_lm"}))
def test_a_familys_parts_are_where_its_entry_says(name, tiny):
    from transformers import DynamicCache
    from transformers.activations import ACT2FN

    model = tiny(name)
    parts, config = anatomy(model), model.config
    assert parts.known and parts.blocks and len(parts.layers) == config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if name == "falcon":
        kv_heads = 1
    elif name == "gpt_bigcode":
        kv_heads = 1 if config.multi_query else config.num_attention_heads
    names = ("hidden_act", "hidden_activation", "activation_function")
    activation = ACT2FN[next((value for key in names if isinstance(value := getattr(config, key, None), str)), "gelu")]
    activation = ACT2FN["gelu_new"] if name == "bloom" else activation
    found = calls(model, past_key_values=DynamicCache(), use_cache=True)
    gave, cache = found[1], found[2].past_key_values
    check_parts(parts, config.num_attention_heads, kv_heads, activation, found, adds_residual=name == "bloom")
    for layer, past in zip(parts.layers, cache.layers, strict=True):
        values = layer.value.of(gave[layer.value.module])
        close(past.values.transpose(1, 2).flatten(2), values.view(1, TOKENS.shape[1], -1), atol=1e-5, rtol=1e-4)
        if layer.key_norm is None:  # the first token's are turned by no position
            keys = layer.key.of(gave[layer.key.module]).view(1, TOKENS.shape[1], -1)[:, 0]
            first = past.keys[:, :, 0].flatten(1)
            close(first * (keys.norm() / first.norm() if name in SCALED else 1), keys, atol=1e-5, rtol=1e-4)
    if name not in SEPARATE:  # what a trial finds by numbers alone
        plan = tracing._plan(model)
        assert plan.modules == [layer.attention for layer in parts.layers]
        assert plan.keys == (name not in SCALED and all(layer.key_norm is None for layer in parts.layers))
        assert [plan.projects[layer.attention] for layer in parts.layers] == [
            layer.output.module for layer in parts.layers
        ]
        for layer in parts.layers:
            assert plan.queries[layer.attention].module in (layer.query_norm, layer.query.module, None)


@pytest.mark.parametrize("changes", [{}, {"multi_query": False}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_falcons_three_layouts(changes, tiny):
    model = tiny("falcon", **changes)
    gave, cache = (found := calls(model, use_cache=True))[1], found[2].past_key_values
    for layer, past in zip(anatomy(model).layers, cache.layers, strict=True):
        values = layer.value.of(gave[layer.value.module]).view(*TOKENS.shape, layer.kv_heads, -1)
        values = values.repeat_interleave(past.values.shape[1] // layer.kv_heads, 2)
        close(past.values.transpose(1, 2), values)


@pytest.mark.parametrize("kind", ["none", "ema"])
def test_our_decoder(kind, make_lm):
    model = make_lm(momentum_kind=kind).model
    parts = anatomy(model)
    assert parts.known and parts.blocks == list(model.layers) and parts.max_positions == 160
    check_parts(parts, 4, 4, torch.nn.functional.gelu, calls_of_ours(model))
    assert torch.equal(logits_of(model, TOKENS), model(TOKENS))
    fresh = untrained_copy(model)
    assert fresh.config == model.config and not torch.equal(fresh.layers[0].fc1.weight, model.layers[0].fc1.weight)


def test_our_decoder_as_a_model_of_transformers():
    pytest.importorskip("transformers")
    from momentum_lm.formats.remote.configuration_momentum_lm import MomentumLMConfig
    from momentum_lm.formats.remote.modeling_momentum_lm import MomentumLMForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MomentumLMForCausalLM(MomentumLMConfig(vocab_size=300, momentum_kind="ema", **shape)).eval()
    parts = anatomy(model)
    assert parts.known and len(parts.blocks) == 2
    check_parts(parts, 4, 4, torch.nn.functional.gelu, calls(model))


def calls_of_ours(model):
    """As :func:`calls`; the last matrix of the feed-forward is not called as a module."""
    given, gave, result = calls(model)
    for layer in model.layers:
        given[layer.fc2] = torch.nn.functional.gelu(gave[layer.fc1])
    return given, gave, result


def test_a_matrix_lies_as_its_family_says_whatever_its_shape(tiny):
    """Heads so narrow that a projection has fewer outputs than inputs: a shape tells nothing."""
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny("phi3", head_dim=4, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rotary)
    (layer, *_) = anatomy(model).layers
    stored = layer.key.module.weight
    assert stored.shape[0] < stored.shape[1]
    mask = layer.key.mask(stored)
    assert mask[8:12].eq(1).all() and mask.sum() == 4 * stored.shape[1]


def test_a_model_of_no_known_family(tiny):
    """Attention that runs is found; what is not known is None, and is not guessed."""
    model = tiny("bert", is_decoder=True)
    parts = anatomy(model)
    assert not parts.known and len(parts.layers) == 4 and len(key_value_weights(model)) == 4
    assert parts.final_norm is None and parts.layers[0].ffn_in is None
    mamba = anatomy(tiny("mamba"))
    assert mamba.layers == [] and mamba.heads is None


def test_anatomies_are_freed_with_their_models(tiny):
    model = tiny("llama")
    with tracing.tracing(model, tracing.AttentionTrace(torch.tensor([[3]]))), torch.no_grad():
        model(TOKENS)
    assert anatomy(copy.deepcopy(model)).blocks != anatomy(model).blocks
    assert not [name for name in vars(model) if "momentum" in name]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None

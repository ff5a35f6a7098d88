"""Traces against attention computed again from the projections' weights, and against transformers' own
eager attention.
"""

import math

import numpy as np
import pytest
import relaxed_attention
import torch

from momentum_lm.errors import UserError
from momentum_lm.lm.anatomy import key_value_weights
from momentum_lm.lm.attention_interface import attention_modules
from momentum_lm.lm.tracing import AttentionTrace, tracing

TOKENS = torch.randint(4, 300, (3, 9), generator=torch.Generator().manual_seed(2))
POSITIONS = torch.tensor([8, 3, 5])
close = torch.testing.assert_close


@pytest.mark.parametrize(
    "changes",
    [{"momentum_kind": "none"}, {}, {"position": "rotary", "momentum_learned": True}, {"momentum_kind": "multi_ema"}],
)
@pytest.mark.parametrize("prefix", [0, 6])
def test_native(make_lm, changes, prefix):
    lm = make_lm(**changes)
    before = TOKENS[:1, :prefix].expand(3, -1)
    whole = torch.cat([before, TOKENS], 1)
    trace, full = (
        AttentionTrace(POSITIONS[:, None], relax=True),
        AttentionTrace(POSITIONS[:, None] + prefix, True, True),
    )
    cache = lm.start(before[0].tolist()).rows(3, frozen=True) if prefix else None
    with torch.no_grad(), tracing(lm.model, trace):
        lm.model(TOKENS, cache)
    with torch.no_grad(), tracing(lm.model, full):
        lm.model(whole)
    lm.model(whole)  # outside of the context nothing is recorded
    assert len(trace.outputs) == len(trace.logits) == len(full.inputs) == 2
    for i, layer in enumerate(lm.model.layers):
        attention, x = layer.self_attn, full.inputs[i]
        with torch.no_grad():
            q, k, v = (
                p(x).unflatten(-1, (4, -1)).transpose(1, 2).double()
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            plain = q
            if lm.model.rotary is not None:
                rotation = lm.model.rotary(torch.arange(whole.shape[1])[None])
                q, k = (lm.model.rotary.rotate(t, *rotation).double() for t in (q, k))
            for row, position in enumerate((POSITIONS + prefix).tolist()):
                query = q[row, :, position] / math.sqrt(q.shape[-1])
                logits = (k[row] @ query[..., None])[..., 0]
                for found in (trace, full):
                    close(
                        found.logits[i][row, 0, :, : position + 1].double(),
                        logits[:, : position + 1],
                        atol=2e-4,
                        rtol=1e-4,
                    )
                    close(
                        found.queries[i][row, 0].double(),
                        plain[row, :, position].flatten() / math.sqrt(8),
                        atol=1e-4,
                        rtol=1e-4,
                    )
                mixed = logits[:, : position + 1].softmax(-1)[:, None] @ v[row, :, : position + 1]
                if attention.momentum is not None:  # the paper's sum over what came before, in the traced output too
                    mixed = mixed + attention.momentum(v[row : row + 1].float())[0][0, :, position, None].double()
                output = attention.out_proj(mixed.transpose(0, 1).flatten(1).float())[0]
                for found in (trace, full):
                    close(found.outputs[i][row, 0], output, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["none", "ema"])
@pytest.mark.parametrize("prefix", [0, 6])
def test_relaxed_attention(make_lm, kind, prefix):
    """Against the float64 functions of ``relaxed_attention``; momentum stays what it is."""
    lm = make_lm(momentum_kind=kind)
    before = TOKENS[:1, :prefix]
    cache = lm.start(before[0].tolist()).rows(3, frozen=True) if prefix else None
    trace, whole = (
        AttentionTrace(POSITIONS[:, None], relax=True),
        AttentionTrace(torch.zeros(3, 1, dtype=torch.long), projections=True),
    )
    with torch.no_grad(), tracing(lm.model, trace):
        lm.model(TOKENS, cache)
    with torch.no_grad(), tracing(lm.model, whole):
        lm.model(torch.cat([before.expand(3, -1), TOKENS], 1))
    for i, layer in enumerate(lm.model.layers):
        close(whole.keys[i], layer.self_attn.k_proj(whole.inputs[i]))
        values = whole.values[i].unflatten(-1, (4, 8)).transpose(1, 2).numpy()
        for row, position in enumerate(POSITIONS.tolist()):
            end = prefix + position + 1
            logits = trace.logits[i][row, 0, :, :end].numpy()
            exact = relaxed_attention.softmax_heads(logits, values[row, :, :end])
            relaxed = relaxed_attention.relaxed_heads(logits, values[row, :, :end], 8**-0.5)
            np.testing.assert_allclose(trace.heads[i][row, 0], exact, atol=1e-3, rtol=1e-3)
            np.testing.assert_allclose(trace.relaxed[i][row, 0], relaxed, atol=1e-2, rtol=1e-3)
            change = torch.from_numpy(relaxed - exact).float().flatten() @ layer.self_attn.out_proj.weight.T
            close(trace.relaxed_outputs[i][row, 0] - trace.outputs[i][row, 0], change, atol=2e-2, rtol=1e-3)


def test_momentum_is_part_of_the_output(make_lm):
    traces = []
    for kind in ("none", "ema"):
        lm = make_lm(momentum_kind=kind)
        traces.append(AttentionTrace(POSITIONS[:, None]))
        with torch.no_grad(), tracing(lm.model, traces[-1]):
            lm.model(TOKENS)
    close(traces[0].logits[0], traces[1].logits[0])  # the first layer's inputs are the same
    assert (traces[0].outputs[0] - traces[1].outputs[0]).norm() > 0.1 * traces[0].outputs[0].norm()


def test_all_queries(make_lm):
    lm = make_lm()
    every, some = AttentionTrace(), AttentionTrace(POSITIONS[:, None])
    for trace in (every, some):
        with torch.no_grad(), tracing(lm.model, trace):
            lm.model(TOKENS)
    assert not every.outputs and not every.logits
    for a, b in zip(every.queries, some.queries, strict=True):
        assert a.shape == (3, 9, 32)
        close(a[torch.arange(3), POSITIONS], b[:, 0])


def configurations(transformers):
    common = dict(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    )
    return {
        "gpt2": transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "llama": transformers.LlamaConfig(**common, intermediate_size=48, num_key_value_heads=2),
        "neox": transformers.GPTNeoXConfig(**common, intermediate_size=48),
        "opt": transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32),
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "opt"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_huggingface(family, prefix):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configurations(transformers)[family]).eval()
    implementation = model.config._attn_implementation
    whole = torch.cat([TOKENS[:1, :prefix].expand(3, -1), TOKENS], 1)
    trace, outputs, cache = AttentionTrace(POSITIONS[:, None]), [], transformers.DynamicCache()
    with torch.no_grad():
        if prefix:
            model(whole[:1, :prefix], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(3)
        with tracing(model, trace):
            traced = model(
                TOKENS, **({"past_key_values": cache, "use_cache": True} if prefix else {"use_cache": False})
            ).logits
        assert model.config._attn_implementation == implementation
        close(traced, model(whole, use_cache=False).logits[:, prefix:], atol=1e-4, rtol=1e-4)
        modules = attention_modules(model)
        model.set_attn_implementation("eager")
        for module in modules:
            module.register_forward_hook(lambda module, given, result: outputs.append(result[0]))
        weights = model(whole, use_cache=False, output_attentions=True).attentions
    assert len(modules) == len(weights) == len(trace.logits) == 2
    for i in range(2):
        for row, position in enumerate(POSITIONS.tolist()):
            seen = slice(0, prefix + position + 1)
            expected = weights[i][row, :, prefix + position, seen]
            close(trace.logits[i][row, 0, :, seen].softmax(-1), expected, atol=1e-5, rtol=1e-4)
            close(trace.outputs[i][row, 0], outputs[i][row, prefix + position], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "opt"])
def test_keys_and_values_are_those_of_the_weights(family):
    """Wherever a family keeps them: beside what attention itself is given, without positions that turn keys."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = configurations(transformers)[family]
    if family == "neox":
        config.rope_parameters["partial_rotary_factor"] = 0.0
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    trace, cache = AttentionTrace(POSITIONS[:, None], projections=True), transformers.DynamicCache()
    with torch.no_grad(), tracing(model, trace):
        model(TOKENS, past_key_values=cache, use_cache=True)
    weights = key_value_weights(model)
    assert len(weights) == 2
    seen = zip(trace.inputs, trace.keys, trace.values, weights, cache.layers, strict=True)
    for inputs, keys, values, (w_k, b_k, w_v, b_v), layer in seen:
        close(torch.nn.functional.linear(inputs, w_k, b_k), keys, atol=1e-5, rtol=1e-4)
        close(torch.nn.functional.linear(inputs, w_v, b_v), values, atol=1e-5, rtol=1e-4)
        close(values, layer.values.transpose(1, 2).flatten(2))
        if family != "llama":
            close(keys, layer.keys.transpose(1, 2).flatten(2))


def test_queries_and_keys_are_those_before_rotation():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configurations(transformers)["llama"]).eval()
    trace, every = AttentionTrace(POSITIONS[:, None], projections=True, relax=True), AttentionTrace()
    for found in (trace, every):
        with torch.no_grad(), tracing(model, found):
            model(TOKENS, use_cache=False)
    for i, module in enumerate(attention_modules(model)):
        query = module.q_proj(trace.inputs[i]) / math.sqrt(8)
        close(every.queries[i], query, atol=1e-5, rtol=1e-4)
        close(trace.queries[i][:, 0], query[torch.arange(3), POSITIONS], atol=1e-5, rtol=1e-4)
        close(trace.keys[i], module.k_proj(trace.inputs[i]))
        close(trace.values[i], module.v_proj(trace.inputs[i]))
        close(module.o_proj(trace.heads[i].flatten(2)), trace.outputs[i], atol=1e-5, rtol=1e-4)
        for row, position in enumerate(POSITIONS.tolist()):
            values = trace.values[i][row, : position + 1].unflatten(-1, (2, 8)).transpose(0, 1).numpy()
            relaxed = relaxed_attention.relaxed_heads(
                trace.logits[i][row, 0, :, : position + 1].numpy(), values, 8**-0.5
            )
            np.testing.assert_allclose(trace.relaxed[i][row, 0], relaxed, atol=1e-5, rtol=1e-3)


def test_a_model_without_attention_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    refused = pytest.raises(UserError, match="MambaForCausalLM does not use transformers' attention interface")
    with refused, tracing(model, AttentionTrace(POSITIONS[:, None])):
        pass

"""Faster ways to compute the same, beside the plain ones."""

import os

import pytest
import torch
import torch.nn.functional as F

from momentum_lm.lm import cpu_fast

pytest.importorskip("transformers")


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_heads_that_share_keys(groups):
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 6, 5, 8), torch.randn(2, 3, groups, 16, 8)
    mask = torch.ones(3, 1, 5, 16, dtype=torch.bool).tril(11)
    found, _ = cpu_fast.grouped_attention(
        type("Module", (), {"num_key_value_groups": 6 // groups}), query, key, value, mask, scaling=0.5
    )
    exact = query.double(), *(x.double().repeat_interleave(6 // groups, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(*exact, mask, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (1, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(shape, bias):
    torch.manual_seed(0)
    layer, rows = torch.nn.Linear(24, 40, bias=bias), torch.randn(shape)

    @cpu_fast.inference
    def run(layer, rows):
        return layer(rows)

    torch.testing.assert_close(run(layer, rows), layer(rows).detach(), atol=1e-5, rtol=1e-5)
    layer, rows = layer.double(), rows.double()
    assert torch.equal(run(layer, rows), layer(rows))
    weight, bias = (
        torch.randn(24, 40).t(),
        torch.randn(80)[::2],
    )  # not contiguous, as where GPT-2's projections are turned
    for given in ((weight,), (weight.contiguous(), bias)):
        found = cpu_fast.inference(F.linear)(rows.float(), *given)
        torch.testing.assert_close(found, F.linear(rows.float(), *given), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_linear_layers_are_onednns_where_no_gradient_is_asked_for(monkeypatch):
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: calls.append(1) or real(*given))
    layer = torch.nn.Linear(4, 5)
    with cpu_fast.OneDNNLinear():
        layer(torch.randn(3, 4)).sum().backward()
        assert not calls and layer.weight.grad is not None
        with torch.no_grad():
            layer(torch.randn(3, 4))
            assert calls == [1]
            with torch.autocast("cpu", torch.bfloat16):  # the caller's choice stands
                assert layer(torch.randn(3, 4)).dtype == torch.bfloat16
    assert calls == [1]


def without(monkeypatch, how):
    """Everything plain: by the switch, or because torch has none of what it promises nobody."""
    if how == "switch":
        monkeypatch.setenv("MOMENTUM_LM_CPU_FAST", "0")
    else:
        monkeypatch.setattr(cpu_fast, "_private", lambda namespace, name: None)


@pytest.mark.parametrize("how", ["switch", "another torch"])
def test_the_plain_way_gives_the_same(how, monkeypatch):
    import transformers

    from momentum_lm.lm.huggingface import HuggingFaceLM

    class Tokenizer:
        eos_token_id, model_max_length = 1, 64

    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=90, **shape, intermediate_size=48, max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens, padding = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[False] * 3, [False, True, True]])
    wanted, found = (torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0]), torch.tensor([3, 4, 5])), []
    calls, real = [], cpu_fast.PackedRows.pad
    monkeypatch.setattr(cpu_fast.PackedRows, "pad", lambda *given: calls.append(1) or real(*given))
    for plain in (False, True):
        if plain:
            without(monkeypatch, how)
        model.set_attn_implementation("sdpa")
        lm = HuggingFaceLM(model, Tokenizer(), "llama", "")
        calls.clear()
        found.append(lm.log_probs(tokens, padding, *wanted, lm.start([20, 21, 22]))[0])
        assert bool(calls) != plain
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["switch", "another torch"])
def test_linear_layers_without_onednn(how, monkeypatch):
    layer, rows = torch.nn.Linear(24, 40), torch.randn(7, 24)
    without(monkeypatch, how)
    assert torch.equal(cpu_fast.inference(layer)(rows), layer(rows))


def test_what_torch_promises_nobody_is_there_today():
    """A torch without it is slower, and this says so first."""
    assert cpu_fast.packs_rows() and cpu_fast._private("aten", "nonesuch") is None
    assert cpu_fast._private("mkldnn", "_linear_pointwise") is not None or not torch.backends.mkldnn.is_available()


def test_oneDNNs_caches_are_limited_by_a_call_alone(monkeypatch):
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv(names[0], "7")
    monkeypatch.delenv(names[1], raising=False)
    cpu_fast.limit_onednn_caches()
    assert [os.environ[name] for name in names] == ["7", "32"]  # the user's own stays
    monkeypatch.delenv(names[1])

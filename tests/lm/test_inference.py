"""Faster ways to compute the same, beside the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from momentum_lm.lm import inference

pytest.importorskip("transformers")


@pytest.fixture
def counted(monkeypatch):
    """Counts how often attention is computed in two parts."""
    calls = []
    real = inference._attend_in_two
    monkeypatch.setattr(inference, "_attend_in_two", lambda *given: calls.append(1) or real(*given))
    return calls


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_to_what_rows_share(groups, batch, counted):
    torch.manual_seed(0)
    shared, own = 11, 5
    query = torch.randn(batch, 6, own, 8)
    prefix, rest = torch.randn(2, 1, groups, shared, 8), torch.randn(2, batch, groups, own, 8)
    key, value = torch.cat([3 * prefix.expand(2, batch, -1, -1, -1), rest], 3)
    mask = torch.ones(batch, 1, own, shared + own, dtype=torch.bool).tril(shared)
    exact = [x.double() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*exact, mask, scale=0.5, enable_gqa=True).transpose(1, 2).float()
    with torch.inference_mode():
        plain, _ = inference.grouped_attention(None, query, key, value, mask, scaling=0.5)
        assert not counted
        with inference.shared_keys(shared):
            found, _ = inference.grouped_attention(None, query, key, value, mask, scaling=0.5)
            assert counted == [1] and found.shape == (batch, own, 6, 8)
            windowed = mask & torch.ones_like(mask).triu(4)  # a sliding window: not every row sees all that they share
            window, _ = inference.grouped_attention(None, query, key, value, windowed, scaling=0.5)
            assert counted == [1]
    torch.testing.assert_close(plain, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        window, F.scaled_dot_product_attention(query, key, value, windowed, scale=0.5, enable_gqa=True).transpose(1, 2)
    )


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (1, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(shape, bias):
    torch.manual_seed(0)
    layer, rows = torch.nn.Linear(24, 40, bias=bias), torch.randn(shape)

    @inference.inference
    def run(layer, rows):
        return layer(rows)

    torch.testing.assert_close(run(layer, rows), layer(rows).detach(), atol=1e-5, rtol=1e-5)
    layer, rows = layer.double(), rows.double()
    assert torch.equal(run(layer, rows), layer(rows))
    view = torch.nn.functional.linear
    weight = torch.randn(24, 40).t()  # not contiguous, as where GPT-2's projections are turned
    torch.testing.assert_close(inference.inference(view)(rows.float(), weight), view(rows.float(), weight), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_linear_layers_are_onednns_where_no_gradient_is_asked_for(monkeypatch):
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: calls.append(1) or real(*given))
    layer = torch.nn.Linear(4, 5)
    with inference.OneDNNLinear():
        layer(torch.randn(3, 4)).sum().backward()
        assert not calls and layer.weight.grad is not None
        with torch.no_grad():
            layer(torch.randn(3, 4))
    assert calls == [1]

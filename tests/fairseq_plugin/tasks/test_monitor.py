"""The arithmetic behind MFU and tokens per second."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import momentum_lm
from momentum_lm.model import Decoder, DecoderConfig

momentum_lm.register()

from momentum_lm.fairseq_plugin.tasks.monitor import TrainingMonitor, flops_per_token  # noqa: E402


def monitor(decoder, **changes):
    task = argparse.Namespace(log_interval=3, tokens_per_sample=32, tensorboard_logdir=None)
    model = argparse.Namespace(decoder_layers=decoder.config.layers, decoder_embed_dim=decoder.config.dim)
    return TrainingMonitor(decoder, model, argparse.Namespace(**vars(task) | changes))


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_those_that_torch_counts(tied):
    decoder = Decoder(DecoderConfig(101, 64, 256, 2, 2, tie_embeddings=tied))
    tokens = torch.randint(4, 101, (3, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(tokens).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    ours = flops_per_token(monitor(decoder).parameters, 2, 64, 32)
    # 6N counts biases and norms as if they multiplied, which at this size is 1-2%
    assert ours == pytest.approx(counted, rel=0.03)


def test_measures_at_the_interval_and_only_there(tmp_path):
    decoder = Decoder(DecoderConfig(101, 64, 256, 2, 2, momentum_kind="ema", momentum_eta=0.5))
    watch = monitor(decoder, tensorboard_logdir=str(tmp_path))
    optimizer = SimpleNamespace(cfg=SimpleNamespace(lr=[0.006, 0.003], _name="adam", weight_decay=0.1))
    tokens = torch.randint(4, 101, (2, 32))
    seen = {}
    for update in range(7):
        watch.before_step(update, optimizer)
        decoder(tokens)
        seen[update] = watch.after_step(64)
    assert [u for u, values in seen.items() if values] == [0, 3, 6]
    of_optimizer = {name: watch.hparams[name] for name in ("lr", "optimizer", "weight_decay", "momentum_eta")}
    assert of_optimizer == {"lr": 0.006, "optimizer": "adam", "weight_decay": 0.1, "momentum_eta": 0.5}
    assert seen[0]["decay"] == pytest.approx(0.5) and seen[0]["ema_over_attention"] > 0
    assert "tokens_per_second" not in seen[0] and seen[3]["tokens_per_second"] > 0 and seen[3]["peak_memory_gib"] > 0.05
    assert not any(layer.self_attn.measure for layer in decoder.layers)


def test_ratio_is_rms_of_the_average_over_rms_of_attention():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(101, 8, 32, 1, 1, momentum_kind="ema", momentum_eta=0.9))
    attention = decoder.layers[0].self_attn
    attention.measure = True
    x = torch.randn(1, 9, 8)
    attention(x)
    v = attention.v_proj(x)
    weights = torch.tensor([[0.9 ** (t - i) if i < t else 0.0 for i in range(9)] for t in range(9)])
    average = weights @ v[0]
    plain = torch.nn.functional.scaled_dot_product_attention(
        attention.q_proj(x), attention.k_proj(x), v, is_causal=True
    )
    expected = average.square().mean().sqrt() / plain.square().mean().sqrt()
    torch.testing.assert_close(attention.momentum_ratio, expected, rtol=1e-5, atol=0)

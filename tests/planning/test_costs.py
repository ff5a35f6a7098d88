"""Parameters and FLOPs, against built decoders, published sizes and torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from momentum_lm.errors import UserError
from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.config import PLACES
from momentum_lm.model.sizes import GPT_SIZES, architecture, architectures
from momentum_lm.planning.costs import count_parameters, flops_per_token, momentum_flops_per_token, multiplying
from momentum_lm.planning.hardware import GPUS, peak_flops

PUBLISHED = {
    "125m": 125e6,
    "350m": 355e6,
    "1_3b": 1.3e9,
    "2_7b": 2.7e9,
    "6_7b": 6.7e9,
    "13b": 13e9,
}  # arXiv 2112.10684, table 1


def config(size, **changes):
    layers, dim, heads, _ = GPT_SIZES[size].values()
    return DecoderConfig(
        **{"vocab_size": 51200, "dim": dim, "ffn_dim": 4 * dim, "layers": layers, "heads": heads, **changes}
    )


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"momentum_kind": "ema", "momentum_learned": True, "momentum_gate": "zero", "tie_embeddings": False}),
        ("tiny", {"momentum_kind": "multi_ema", "position": "learned", "max_positions": 77}),
        ("125m", {"vocab_size": 1000}),
    ],
)
def test_parameters_are_those_of_the_built_decoder(size, changes):
    shape = config(size, **changes)
    decoder = Decoder(shape)
    counted = count_parameters(shape)
    assert counted.total == sum(p.numel() for p in decoder.parameters())
    assert counted.block == sum(p.numel() for p in decoder.layers[1].parameters())
    assert counted.momentum == sum(p.numel() for n, p in decoder.named_parameters() if "momentum" in n)
    assert counted.other == sum(p.numel() for p in decoder.layers.parameters()) + 2 * shape.dim
    assert multiplying(shape, counted) == counted.total - sum(
        m.weight.numel()
        for m in decoder.modules()
        if isinstance(m, torch.nn.Embedding) and m.weight is not decoder.output_projection.weight
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_of_the_large_sizes(size):
    counted = count_parameters(config(size))
    layers, dim, _, _ = GPT_SIZES[size].values()
    assert counted.total == layers * (12 * dim**2 + 13 * dim) + 2 * dim + 51200 * dim
    assert counted.total == pytest.approx(PUBLISHED[size], rel=0.02)
    assert counted.embedding == 51200 * dim and counted.momentum == 0


@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied, position):
    shape = DecoderConfig(101, 64, 256, 2, 2, max_positions=48, tie_embeddings=tied, position=position)
    counted = count(shape, 48)
    # 6 per parameter counts biases and norms as if they multiplied, which at this size is 1-2%
    assert flops_per_token(multiplying(shape, count_parameters(shape)), 2, 64, 48) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    "momentum",
    [{"momentum_kind": "ema"}, {"momentum_kind": "ema", "momentum_learned": True}, {"momentum_kind": "multi_ema"}],
)
def test_momentums_flops_are_those_that_torch_counts(momentum):
    shape = {"vocab_size": 101, "dim": 64, "ffn_dim": 64, "layers": 2, "heads": 2}
    extra = count(DecoderConfig(**shape, **momentum), 512) - count(DecoderConfig(**shape), 512)
    assert momentum_flops_per_token(DecoderConfig(**shape, **momentum)) == pytest.approx(extra, rel=0.07)
    assert momentum_flops_per_token(DecoderConfig(**shape)) == 0


@pytest.mark.parametrize("place", [place for place in PLACES if place != "depth"])
def test_flops_of_a_few_taps_are_six_per_weight(place):
    """One multiplication and one addition, forward and twice backward."""
    shape = {"dim": 24, "ffn_dim": 40, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 10}
    config = DecoderConfig(101, **shape, momentum_kind="fir", momentum_current=True, momentum_at=place)
    assert momentum_flops_per_token(config) == 6 * count_parameters(config).momentum > 0


def count(shape, length):
    """FLOPs of a token, forward and backward."""
    tokens = torch.randint(4, 101, (3, length))
    decoder = Decoder(shape)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(tokens).sum().backward()
    return counter.get_total_flops() / tokens.numel()


def test_architectures_by_name():
    assert (
        architectures()[0] == "gpt_lm_tiny"
        and architectures()[-1] == "momentum_llama_lm_8b"
        and len(architectures()) == 26
    )
    assert architecture("gpt_lm_6_7b") == {**GPT_SIZES["6_7b"], "momentum_kind": "none"}
    assert architecture("momentum_lm_1_3b") == {**GPT_SIZES["1_3b"], "momentum_kind": "ema"}
    for name in ("momentum_lm", "momentum_lm_", "momentum_lm_1b", "125m", ""):
        with pytest.raises(UserError, match=f"arch=.{name}.: choose one of gpt_lm_tiny, .*, momentum_llama_lm_8b"):
            architecture(name)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peaks_by_the_names_that_cuda_reports(name, peak):
    assert peak_flops(name) == peak


def test_data_sheets_are_in_their_units():
    for gpu in GPUS.values():
        assert 30e9 < gpu.memory < 200e9 and 1e14 < gpu.flops < 3e15 and gpu.fp32_flops < gpu.flops
        assert 0.5e12 < gpu.bandwidth < 1e13 and 3e10 < gpu.link < 1e12

"""The decoder against the equations of its components, written out once more with loops and in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.config import RotaryScaling
from momentum_lm.model.positions import Rotary
from momentum_lm.model.sizes import architecture, architectures

COMPONENTS = {
    "plain": {},
    "rms": dict(norm="rms", norm_eps=1e-2),
    "layer_eps": dict(norm_eps=1e-2),
    "gated": dict(ffn="gated", activation="silu"),
    "gated_gelu": dict(ffn="gated"),
    "grouped": dict(kv_heads=2),
    "one_kv_head": dict(kv_heads=1, position="rotary"),
    "head_dim": dict(head_dim=6),
    "qkv_bias": dict(bias="qkv"),
    "no_bias": dict(bias="none", ffn="gated"),
    "qk_norm": dict(qk_norm=True, norm="rms", kv_heads=2),
    "qk_layer_norm": dict(qk_norm=True, position="rotary"),
    "rotary": dict(position="rotary", rotary_base=50.0),
    "partial": dict(position="rotary", head_dim=8, rotary_fraction=0.5),
    "scaled": dict(position="rotary", head_dim=8, rotary_scaling="llama3:8,1,4,12"),
    "no_positions": dict(position="none"),
    "parallel": dict(parallel_residual=True),
    "llama": dict(norm="rms", ffn="gated", activation="silu", kv_heads=2, bias="none", position="rotary",
                  scale_embeddings=False, tie_embeddings=False),
}  # fmt: skip
MOMENTUM = {
    "none": {},
    "ema": dict(momentum_kind="ema", momentum_learned=True, momentum_normalize=True),
    "multi_ema": dict(momentum_kind="multi_ema"),
}


def build(**options):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**dict(vocab_size=20, dim=16, ffn_dim=24, layers=2, heads=4) | options)).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder.eval()


def norm(x, module, config):
    """x (T, C) -> the same, one row at a time."""
    rows = []
    for row in x:
        centre = row.mean() if config.norm == "layer" else 0.0
        scale = ((row - centre).square().mean() + config.norm_eps).rsqrt()
        rows.append((row - centre) * scale * module.weight)
    return torch.stack(rows) + (module.bias if config.norm == "layer" else 0.0)


def rotated(x, position, config):
    """x (D,) of one head at one position, as a complex number for each pair of dimensions."""
    size, scaling = config.rotary_dim, RotaryScaling.parse(config.rotary_scaling)
    out = x.clone()
    for i in range(size // 2):
        frequency = config.rotary_base ** (-2 * i / size)
        if scaling is not None:
            turns = scaling.original * frequency / (2 * math.pi)
            share = min(max((turns - scaling.low) / (scaling.high - scaling.low), 0), 1)
            frequency = share * frequency + (1 - share) * frequency / scaling.factor
        frequency = float(torch.tensor(frequency, dtype=torch.float32))
        angle = torch.tensor(position * frequency, dtype=torch.float32).double()
        turned = torch.complex(x[i], x[i + size // 2]) * torch.polar(torch.ones_like(angle), angle)
        out[i], out[i + size // 2] = turned.real, turned.imag
    return out


def linear(x, module):
    return x @ module.weight.t() + (0.0 if module.bias is None else module.bias)


def momentum_of(values, module, config):
    """values (T, G, D) -> the same, by the formulas of its two kinds."""
    out = torch.zeros_like(values)
    if config.momentum_kind == "ema":
        decays = torch.sigmoid(module.decay_logit.double())
        for t, g in itertools.product(range(len(values)), range(values.shape[1])):
            for i in range(t):
                out[t, g] += (1 - decays[g]) / decays[g] * decays[g] ** (t - i) * values[i, g]
    if config.momentum_kind == "multi_ema":
        decays = torch.sigmoid(module.delta.double()).unflatten(0, values.shape[1:])
        weights = module.gamma.double().unflatten(0, values.shape[1:]) / math.sqrt(values[0].numel())
        for t in range(len(values)):
            for i in range(t + 1):
                out[t] += (weights * decays ** (t - i)).sum(-1) * values[i]
    return out


def attention(x, module, config):
    """x (T, C) -> the same."""
    length, size = len(x), config.head_dim
    q, k, v = (linear(x, p).view(length, -1, size) for p in (module.q_proj, module.k_proj, module.v_proj))
    if config.qk_norm:
        q, k = (norm(y.flatten(0, 1), m, config).view_as(y) for y, m in ((q, module.q_norm), (k, module.k_norm)))
    if config.position == "rotary":
        turned = ([rotated(head, t, config) for t in range(length) for head in y[t]] for y in (q, k))
        q, k = (torch.stack(heads).view(length, -1, size) for heads in turned)
    average = momentum_of(v, module.momentum, config)
    out = torch.zeros(length, config.heads, size, dtype=x.dtype)
    for t, h in itertools.product(range(length), range(config.heads)):
        group = h // (config.heads // config.kv_heads)
        weights = torch.softmax(k[: t + 1, group] @ q[t, h] / math.sqrt(size), 0)
        out[t, h] = weights @ v[: t + 1, group] + average[t, group]
    return linear(out.flatten(1), module.out_proj)


def logits(decoder, tokens):
    """tokens (T,) -> (T, V)."""
    config = decoder.config
    x = decoder.embed_tokens.weight[tokens] * (math.sqrt(config.dim) if config.scale_embeddings else 1.0)
    if config.position == "sinusoidal":
        half = config.dim // 2
        rows = torch.arange(len(tokens))[:, None] + config.padding_idx + 1
        angle = rows.float() * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        x = x + torch.cat([angle.sin(), angle.cos()], 1).double()
    activation = {"gelu": F.gelu, "silu": F.silu}[config.activation]
    for block in decoder.layers:
        attended = x + attention(norm(x, block.self_attn_layer_norm, config), block.self_attn, config)
        inner = norm(x if config.parallel_residual else attended, block.final_layer_norm, config)
        if config.ffn == "gated":
            hidden = activation(linear(inner, block.fc_gate)) * linear(inner, block.fc1)
        else:
            hidden = activation(linear(inner, block.fc1))
        x = attended + linear(hidden, block.fc2)
    return norm(x, decoder.layer_norm, config) @ decoder.output_projection.weight.t()


@pytest.mark.parametrize("momentum", MOMENTUM)
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_decoder_is_its_equations(component, momentum):
    decoder = build(**COMPONENTS[component], **MOMENTUM[momentum])
    tokens = torch.randint(4, 20, (7,), generator=torch.Generator().manual_seed(1))
    expected = logits(decoder, tokens)
    torch.testing.assert_close(decoder(tokens[None])[0], expected, rtol=0, atol=1e-6)  # angles are in fp32
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters, allow_unused=True)
                    for x in (decoder(tokens[None])[0], expected))  # fmt: skip
    for (name, _), a, b in zip(decoder.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_the_frequencies_are_those_of_transformers():
    given = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192}  # fmt: skip
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=given)).inv_freq
    ours = Rotary(64, 5e5, RotaryScaling.parse("llama3:32,1,4,8192")).frequency
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "text",
    [
        "llama3:8,1,4,8192",
        "llama3:8.0,1.0,4,8192",
        '{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0, '
        '"original_max_position_embeddings": 8192}',
    ],
)
def test_scaling_has_one_form(text):
    config = DecoderConfig(20, 16, 24, 1, 2, position="rotary", rotary_scaling=text)
    assert config.rotary_scaling == "llama3:8,1,4,8192"
    assert RotaryScaling.parse('{"rope_type": "default"}') is None


def test_a_gated_layer_of_no_given_width_has_about_as_many_parameters():
    plain, gated = (DecoderConfig(20, 768, 0, 1, 12, ffn=kind) for kind in ("plain", "gated"))
    assert (plain.ffn_dim, gated.ffn_dim) == (3072, 2048)


@pytest.mark.parametrize("arch", [name for name in architectures() if "llama" in name])
def test_llama_archs_have_the_shapes_of_the_published_models(arch):
    config = DecoderConfig(128256, **architecture(arch))
    assert config.momentum_kind == ("ema" if arch.startswith("momentum") else "none")
    with torch.device("meta"):
        decoder = Decoder(config)
    other = sum(p.numel() for name, p in decoder.named_parameters() if not name.startswith(("embed", "output")))
    published = {  # parameters of the published models, their embeddings left out
        "135m": 134_515_008 - 49_152 * 576,
        "360m": 361_821_120 - 49_152 * 960,
        "1b": 1_235_814_400 - 128_256 * 2048,
        "3b": 3_212_749_824 - 128_256 * 3072,
        "8b": 8_030_261_248 - 2 * 128_256 * 4096,
    }
    size = arch.rpartition("_")[2]
    assert other == published.get(size, 3 * (4 * 192**2 + 3 * 192 * 512 + 2 * 192) + 192)

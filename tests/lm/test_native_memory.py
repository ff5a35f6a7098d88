"""What loading costs: a mapped file's pages and no copies; and the file stays as it is, whatever becomes of the
weights.
"""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from momentum_lm.formats.decoder_options import from_fairseq
from momentum_lm.lm.native import load_native
from momentum_lm.model import Decoder, DecoderConfig

OPTIONS = {
    "decoder_embed_dim": 768, "decoder_ffn_embed_dim": 3072, "decoder_layers": 12, "decoder_attention_heads": 12,
    "activation_fn": "gelu",
    "decoder_learned_pos": False, "decoder_normalize_before": True, "share_decoder_input_output_embed": True,
    "tokens_per_sample": 2048,
}  # fmt: skip
SMALL = {
    "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 4,
    "activation_fn": "gelu",
    "position": "sinusoidal", "momentum_kind": "ema", "max_target_positions": 32,
}  # fmt: skip
MEASURE = """
import json, sys, torch
from momentum_lm.lm.native import load_native
def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
def use(model):
    for parameter in model.parameters():
        for row in parameter.view(-1).split(1 << 20):
            row.sum()
def growth(path, dtype):
    peak, own = memory("VmHWM"), memory("RssAnon")
    lm = load_native(path, dtype=dtype)
    use(lm.model)
    return memory("VmHWM") - peak, memory("RssAnon") - own
dtype = getattr(torch, sys.argv[3])
growth(sys.argv[1], dtype)
print(json.dumps(growth(sys.argv[2], dtype)))
"""


def checkpoint(path, options, copies=False):
    """A model of zeros in fp16, under fairseq's names. ``copies``: its tied matrices are stored twice."""
    with torch.device("meta"):
        state = Decoder(from_fairseq(options, 51200)).state_dict()
    tensors = {f"decoder.{name}": torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in state.items()}
    if not copies:
        tensors["decoder.output_projection.weight"] = tensors["decoder.embed_tokens.weight"]
    tensors |= {"decoder.version": torch.tensor([3.0]), "decoder.embed_positions._float_tensor": torch.zeros(1)}
    torch.save({"args": None, "cfg": {"model": options}, "model": tensors}, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Loaded before, so that code and buffers are in memory."""
    changes = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    return checkpoint(tmp_path_factory.mktemp("small") / "model.pt", OPTIONS | changes)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("copies", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_125m_in_fp16_takes_its_file_and_in_fp32_its_weights(small, tmp_path, copies):
    path = checkpoint(tmp_path / "model.pt", OPTIONS, copies)
    size = path.stat().st_size
    assert size > 2 * 124e6
    grown = {}
    for dtype in ("float16", "float32"):
        command = [sys.executable, "-c", MEASURE, small, path, dtype]
        grown[dtype] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = 2 * 124.4e6
    assert grown["float16"][0] < 1.2 * size and grown["float16"][1] < 0.1 * size, (
        grown
    )  # peak; and memory of its own, not the file's pages
    assert 1.95 * weights < grown["float32"][1] < 2.1 * weights, grown
    assert grown["float32"][0] < 2.1 * weights + 1.05 * size, (
        grown
    )  # beside the weights nothing but pages that can be dropped at any time


def test_the_file_stays_as_it_is(tmp_path):
    """The finetuning study writes into the weights, and other writers may."""
    torch.manual_seed(0)
    config = DecoderConfig(
        40, 16, 24, 2, 4, max_positions=32, momentum_kind="ema", momentum_learned=True, momentum_eta=0.7
    )
    model = {f"decoder.{name}": tensor for name, tensor in Decoder(config).state_dict().items()}
    torch.save({"cfg": {"model": SMALL | {"momentum_learned": True}}, "model": model}, tmp_path / "c.pt")
    digest = hashlib.sha256((tmp_path / "c.pt").read_bytes()).digest()
    lm = load_native(tmp_path / "c.pt")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(1)
            parameter.data.mul_(2)
    assert hashlib.sha256((tmp_path / "c.pt").read_bytes()).digest() == digest
    again = load_native(tmp_path / "c.pt").model
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(again.get_parameter(name), model[f"decoder.{name}"])
        assert torch.equal(parameter, (model[f"decoder.{name}"] + 1) * 2)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_is_left_without_values(tmp_path, position, dtype):
    """Buffers that no checkpoint holds are those of a model made as usual; tied matrices are one."""
    config = DecoderConfig(
        40, 16, 24, 2, 4, max_positions=32, position=position, momentum_kind="ema", momentum_normalize=True
    )
    torch.manual_seed(0)
    model = Decoder(config)
    options = SMALL | {"position": position, "momentum_normalize": True}
    tensors = {f"decoder.{name}": t for name, t in model.state_dict().items()}
    torch.save({"cfg": {"model": options}, "model": tensors}, tmp_path / "c.pt")
    loaded = load_native(tmp_path / "c.pt", dtype=dtype).model
    expected = dict(model.to(dtype).named_buffers())
    assert {name: (b.dtype, b.device) for name, b in loaded.named_buffers()} == {
        name: (b.dtype, b.device) for name, b in expected.items()
    }
    assert all(torch.equal(b, expected[name]) for name, b in loaded.named_buffers())
    assert loaded.output_projection.weight is loaded.embed_tokens.weight
    assert all(p.device.type == "cpu" and not p.requires_grad for p in loaded.parameters())

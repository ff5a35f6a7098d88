"""What is gathered in which precision, in a group of one process, where parts are wholes; and where the weights come
from, in two.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist

from momentum_lm.fairseq_plugin.sharding import FullySharded
from momentum_lm.model import Decoder, DecoderConfig


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


LLAMA = dict(norm="rms", ffn="gated", activation="silu", bias="none", position="rotary", qk_norm=True)


@pytest.mark.parametrize("kind", ["ema", "multi_ema"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", [{}, LLAMA], ids=["gpt", "llama"])
def test_matrices_travel_in_bf16_and_the_rest_is_as_under_autocast(kind, checkpointing, form, group):
    momentum = dict(momentum_kind=kind, momentum_learned=kind == "ema")
    config = DecoderConfig(60, 32, 64, 2, 2, checkpoint_activations=checkpointing, dropout=0.0, **form, **momentum)
    torch.manual_seed(0)
    plain = Decoder(config)
    divided = Decoder(config)
    divided.load_state_dict(plain.state_dict())
    sharded = FullySharded(divided, group, torch.device("cpu"), torch.bfloat16)
    seen = {}
    block = divided.layers[1]
    parts = {
        "matrix": block.fc1,
        "norm": block.final_layer_norm,
        "momentum": block.self_attn.momentum,
        "last": divided.layer_norm,
    }
    for name, module in parts.items():
        module.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: {p.dtype for p in m.parameters()}}))
    block.register_forward_pre_hook(lambda m, x: seen.update({"residual": {x[0].dtype}}))
    tokens = torch.randint(4, 60, (3, 17), generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (sharded, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model.module if model is sharded else model)(tokens).float().square().mean()
        loss.backward()
        named = dict(model.named_parameters())
        gradients.append({name.removeprefix("module."): p.grad for name, p in named.items()})
    assert seen.pop("matrix") == {torch.bfloat16}
    assert seen.keys() == {"norm", "momentum", "last", "residual"} and all(
        dtypes == {torch.float32} for dtypes in seen.values()
    )
    for name, expected in gradients[1].items():
        found = gradients[0][name].full_tensor()
        assert found.dtype == torch.float32
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert float((found - expected).norm()) < 0.05 * float(expected.norm()), name


SHAPE = DecoderConfig(61, 30, 64, 2, 3, position="rotary", momentum_kind="ema", absent_tokens=(0, 5), dropout=0.0)
TOKENS = torch.arange(4, 40).reshape(2, 18)


def build(rank, folder, on_meta):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    with torch.device("meta") if on_meta and rank else contextlib.nullcontext():
        model = Decoder(SHAPE)
    sharded = FullySharded(model, dist.group.WORLD, torch.device("cpu"))
    found = {
        "state": sharded.state_dict(),
        "held": sum(p.to_local().numel() for p in model.parameters()),
        "tied": model.output_projection.weight is model.embed_tokens.weight,
        "logits": sharded(TOKENS).detach(),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("on_meta", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_all_begin_with_the_weights_of_the_first(on_meta, tmp_path):
    """Also where the others built a shape only. Heads, width and vocabulary do not divide by two: parts are unequal."""
    torch.multiprocessing.spawn(build, (str(tmp_path), on_meta), nprocs=2)
    torch.manual_seed(0)
    plain = Decoder(SHAPE)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = plain.state_dict()
    assert found[0]["state"].keys() == expected.keys() and not found[1]["state"]
    assert all(torch.equal(found[0]["state"][name], value) for name, value in expected.items())
    for process in found:
        assert process["tied"]
        torch.testing.assert_close(process["logits"], plain(TOKENS).detach())
    assert sum(process["held"] for process in found) == sum(p.numel() for p in plain.parameters())

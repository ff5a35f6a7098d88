"""What is gathered in which precision: in a group of one process, where parts are wholes."""

import pytest
import torch
import torch.distributed as dist

from momentum_lm.modules import Decoder, DecoderConfig
from momentum_lm.training.sharding import FullySharded


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ema", "multi_ema"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_matrices_travel_in_bf16_and_the_rest_is_as_under_autocast(kind, checkpointing, group):
    config = DecoderConfig(
        60, 32, 64, 2, 2, momentum_kind=kind, momentum_learned=kind == "ema", checkpoint_activations=checkpointing, dropout=0.0
    )
    torch.manual_seed(0)
    plain = Decoder(config)
    divided = Decoder(config)
    divided.load_state_dict(plain.state_dict())
    sharded = FullySharded(divided, group, torch.device("cpu"), torch.bfloat16)
    seen = {}
    block = divided.layers[1]
    parts = {"matrix": block.fc1, "norm": block.final_layer_norm, "momentum": block.self_attn.momentum, "last": divided.layer_norm}
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
    assert seen.keys() == {"norm", "momentum", "last", "residual"} and all(dtypes == {torch.float32} for dtypes in seen.values())
    for name, expected in gradients[1].items():
        found = gradients[0][name].full_tensor()
        assert found.dtype == torch.float32
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert float((found - expected).norm()) < 0.05 * float(expected.norm()), name

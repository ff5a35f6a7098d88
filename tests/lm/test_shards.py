"""Checkpoints in parts: joined where a model is asked for. tests/commands/test_scale_out.py has real ones."""

import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.lm.native import load_native
from momentum_lm.modules import Decoder, DecoderConfig

OPTIONS = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 4, "activation_fn": "gelu",
           "position": "sinusoidal", "momentum_kind": "ema", "momentum_learned": True, "max_target_positions": 32}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Decoder(DecoderConfig(43, 16, 24, 2, 4, max_positions=32, momentum_kind="ema", momentum_learned=True)).eval()


@pytest.fixture
def parts(model, tmp_path):
    """Three files: every parameter in equal parts of its rows, the last ones smaller or empty."""
    for rank in range(3):
        tensors = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
        divided = {}
        for name, tensor in tensors.items():
            size = -(-len(tensor) // 3)
            divided[name] = tensor[rank * size : (rank + 1) * size].clone()
        state = {
            "cfg": {"model": OPTIONS}, "model": divided, "optimizer_history": [{"num_updates": 7}],
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(2 - rank)}}},
            "fsdp_metadata": {"rank": rank, "world_size": 3, "divided": list(divided)},
        }  # fmt: skip
        torch.save(state, tmp_path / f"checkpoint_last-shard{rank}.pt")
    return tmp_path


def assert_same(lm, model):
    tokens = torch.randint(4, 43, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(lm.model(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["", "checkpoint_last-shard0.pt", "checkpoint_last-shard2.pt"])
def test_any_part_or_their_folder_is_the_model(parts, model, name):
    lm = load_native(parts / name)
    assert_same(lm, model)
    first = load_native(parts)
    assert (lm.name, lm.sha256) == (first.name, first.sha256)
    assert load_native(parts / name, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_digest_is_of_all_parts(parts):
    before = load_native(parts).sha256
    last = parts / "checkpoint_last-shard2.pt"
    state = torch.load(last)
    state["model"]["decoder.layers.0.fc1.weight"] += 1
    torch.save(state, last)
    assert load_native(parts).sha256 != before


def change(file, **entries):
    torch.save(torch.load(file) | entries, file)


def test_parts_that_do_not_join_are_named(parts):
    first, second, third = (parts / f"checkpoint_last-shard{rank}.pt" for rank in range(3))
    change(second, optimizer_history=[{"num_updates": 6}])
    with pytest.raises(UserError, match=r"checkpoint_last-shard0\.pt: the parts are of different updates \(6, 7\)"):
        load_native(parts)
    second.unlink()
    with pytest.raises(UserError, match=r"cannot read checkpoint .*checkpoint_last-shard1\.pt"):
        load_native(third)
    first.rename(parts / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt: it is one part of a checkpoint: name it NAME-shardN\.pt again"):
        load_native(parts / "best.pt")


def test_a_whole_checkpoint_of_a_sharded_run_is_whole(parts, model):
    tensors = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items()}
    change(parts / "checkpoint_last-shard0.pt", model=tensors, fsdp_metadata={"rank": 0, "world_size": 3, "divided": []})
    assert load_native(parts / "checkpoint_last-shard0.pt").vocab_size == 43


@pytest.fixture
def fairscale_parts(model, tmp_path):
    return write_fairscale_parts(model, tmp_path, 3)


def write_fairscale_parts(model, tmp_path, count):
    """As fairscale 0.4.13 writes them: the first block one vector, all else another, both cut into parts that are padded to one length."""
    whole = {f"decoder.{name}": tensor for name, tensor in model.state_dict().items() if name != "output_projection.weight"}
    block = "decoder.layers.0"
    groups = {block: {}, "": {}}
    for name, tensor in whole.items():
        groups[block if name.startswith(f"{block}.") else ""][name] = tensor
    states = [{"cfg": {"model": OPTIONS}, "model": {}, "fsdp_metadata": {"param_metadata": [], "buffer_names": []}} for _ in range(count)]
    for path, tensors in groups.items():
        prefix = f"{path}." if path else ""
        chunks = list(torch.cat([tensor.flatten() for tensor in tensors.values()]).chunk(count))
        shared = [] if path else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]
        for state, chunk in zip(states, chunks, strict=True):
            padding = len(chunks[0]) - len(chunk)
            state["model"][f"{prefix}flat_param_0"] = torch.nn.functional.pad(chunk, [0, padding])
            names, shapes = [name.removeprefix(prefix) for name in tensors], [tensor.shape for tensor in tensors.values()]
            flat = {"names": names, "shapes": shapes, "numels": [shape.numel() for shape in shapes], "padding": padding}
            entry = {"fsdp_path": path, "params": {"flat_param_0": flat}, "no_broadcast_optim_state": False, "shared_param_info": shared}
            state["fsdp_metadata"]["param_metadata"].append(entry)
    assert any(entry["params"]["flat_param_0"]["padding"] for entry in states[-1]["fsdp_metadata"]["param_metadata"]) == (count > 1)
    for rank, state in enumerate(states):
        torch.save(state, tmp_path / f"model-shard{rank}.pt")
    return tmp_path


def test_what_one_process_wrote_is_a_part_too(model, tmp_path):
    assert_same(load_native(write_fairscale_parts(model, tmp_path, 1)), model)


def test_fairscales_parts_are_joined_too(fairscale_parts, model):
    lm = load_native(fairscale_parts)
    assert_same(lm, model)
    assert len(lm.files) == 3
    for left in (2, 1):
        (fairscale_parts / f"model-shard{left}.pt").unlink()
        with pytest.raises(UserError, match=f"of its parts {left} are there, .*: some are missing"):
            load_native(fairscale_parts / "model-shard0.pt")


def test_fairscales_parts_of_different_updates(fairscale_parts):
    for rank in range(3):
        change(fairscale_parts / f"model-shard{rank}.pt", optimizer_history=[{"num_updates": 4 + rank}])
    with pytest.raises(UserError, match=r"the parts are of different updates \(4, 5, 6\)"):
        load_native(fairscale_parts)

"""Checkpoints in parts: joined where a model is asked for. tests/commands/test_scale_out.py has real ones."""

import pytest
import torch

from momentum_lm.errors import UserError
from momentum_lm.lm.native import load_native
from momentum_lm.model import Decoder, DecoderConfig

OPTIONS = {"decoder_embed_dim": 16, "decoder_ffn_embed_dim": 24, "decoder_layers": 2, "decoder_attention_heads": 4,
"activation_fn": "gelu",
           "position": "sinusoidal", "momentum_kind": "ema", "momentum_learned": True,
           "max_target_positions": 32}  # fmt: skip


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
    change(
        parts / "checkpoint_last-shard0.pt", model=tensors, fsdp_metadata={"rank": 0, "world_size": 3, "divided": []}
    )
    assert load_native(parts / "checkpoint_last-shard0.pt").vocab_size == 43


@pytest.fixture
def fairscale_parts(model, tmp_path):
    return write_fairscale_parts(model, tmp_path, 3)


def write_fairscale_parts(model, tmp_path, count):
    """As fairscale 0.4.13 writes them: the first block one vector, all else another, both cut into parts that are
    padded to one length.
    """
    whole = {
        f"decoder.{name}": tensor for name, tensor in model.state_dict().items() if name != "output_projection.weight"
    }
    block = "decoder.layers.0"
    groups = {block: {}, "": {}}
    for name, tensor in whole.items():
        groups[block if name.startswith(f"{block}.") else ""][name] = tensor
    states = [
        {"cfg": {"model": OPTIONS}, "model": {}, "fsdp_metadata": {"param_metadata": [], "buffer_names": []}}
        for _ in range(count)
    ]
    for path, tensors in groups.items():
        prefix = f"{path}." if path else ""
        chunks = list(torch.cat([tensor.flatten() for tensor in tensors.values()]).chunk(count))
        shared = [] if path else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]
        for state, chunk in zip(states, chunks, strict=True):
            padding = len(chunks[0]) - len(chunk)
            state["model"][f"{prefix}flat_param_0"] = torch.nn.functional.pad(chunk, [0, padding])
            names, shapes = (
                [name.removeprefix(prefix) for name in tensors],
                [tensor.shape for tensor in tensors.values()],
            )
            flat = {"names": names, "shapes": shapes, "numels": [shape.numel() for shape in shapes], "padding": padding}
            entry = {
                "fsdp_path": path,
                "params": {"flat_param_0": flat},
                "no_broadcast_optim_state": False,
                "shared_param_info": shared,
            }
            state["fsdp_metadata"]["param_metadata"].append(entry)
    assert any(
        entry["params"]["flat_param_0"]["padding"] for entry in states[-1]["fsdp_metadata"]["param_metadata"]
    ) == (count > 1)
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


ODD_METADATA = {
    "a billion parts": (
        {"world_size": 10**9},
        r"cannot read checkpoint .*-shard3\.pt: it is not there, one of 1,000,000,000 parts",
    ),
    "no parts": ({"world_size": 0}, r"number of parts \(fsdp_metadata\) is 0, not a whole number of at least 1"),
    "parts that are a word": ({"world_size": "3"}, r"number of parts \(fsdp_metadata\) is '3', not a whole number"),
    "fewer parts": ({"world_size": 2}, "the checkpoint has 2 parts, and of these some are missing or doubled"),
    "a rank that is a list": ({"rank": [0]}, r"its rank \(fsdp_metadata\) is \[0\], not a whole number"),
    "a rank twice": ({"rank": 1}, r"has 3 parts, and of these \[0\] are missing"),
    "a rank of another": ({"rank": 10**12}, "its rank .* is 1000000000000, not"),
    "names that are numbers": ({"divided": [5]}, "`divided` that is not a list of names"),
    "names that are a tensor": ({"divided": torch.ones(3)}, "`divided` that is not a list of names"),
    "parts that are a tensor": ({"world_size": torch.ones(3)}, "its number of parts"),
    "names that are a text": ({"divided": "decoder"}, "`divided` that is not a list of names"),
}


@pytest.mark.parametrize("case", ODD_METADATA)
def test_odd_metadata(case, parts):
    entries, message = ODD_METADATA[case]
    file = parts / "checkpoint_last-shard0.pt"
    metadata = torch.load(file)["fsdp_metadata"]
    change(file, fsdp_metadata=metadata | entries)
    with pytest.raises(UserError, match=message) as error:
        load_native(parts)
    assert "checkpoint_last-shard" in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"decoder.layers.0.fc1.bias": torch.zeros(2, 2)},
            r"parts do not fit one another or their fsdp_metadata \(RuntimeError: ",
        ),
        ({"decoder.layers.0.fc1.bias": torch.tensor(1.0)}, "parts do not fit one another"),
        ({"decoder.layers.0.fc1.bias": torch.zeros(8).long()}, "the parts of a tensor are of different types"),
        ({"decoder.layers.0.fc1.bias": 5}, r"decoder\.layers\.0\.fc1\.bias is no tensor"),
        ({"decoder.more": torch.zeros(8)}, "the parts have different names of tensors"),
    ],
)
def test_parts_of_different_shapes(changes, message, parts):
    file = parts / "checkpoint_last-shard1.pt"
    change(file, model=torch.load(file)["model"] | changes)
    with pytest.raises(UserError, match=message):
        load_native(parts)


@pytest.mark.parametrize("entries", [{"params": 5}, {"params": {"flat_param_0": {}}}, {"fsdp_path": 3},
    {"shared_param_info": [1]},
                                     {"params": {"other": {"names": [], "shapes": [], "numels": [],
                                         "padding": 0}}}])  # fmt: skip
def test_odd_metadata_of_fairscale(entries, fairscale_parts):
    file = fairscale_parts / "model-shard0.pt"
    metadata = torch.load(file)["fsdp_metadata"]
    metadata["param_metadata"][0] |= entries
    change(file, fsdp_metadata=metadata)
    with pytest.raises(UserError, match=r"model-shard0\.pt: the parts do not fit one another or their fsdp_metadata"):
        load_native(fairscale_parts)


@pytest.mark.parametrize("history", [[5], "x", [{"num_updates": "7"}], [{"num_updates": -1}]])
def test_odd_histories(history, parts):
    change(parts / "checkpoint_last-shard1.pt", optimizer_history=history)
    with pytest.raises(UserError, match=r"its (optimizer_history is not a list of dicts|number of updates is)"):
        load_native(parts)


def test_odd_parts_are_not_joined_by_the_command(parts, capsys):
    from momentum_lm.cli.convert import main

    file = parts / "checkpoint_last-shard0.pt"
    metadata = torch.load(file)["fsdp_metadata"]
    for entries, message in (
        ({"world_size": 10**9}, "checkpoint_last-shard3.pt"),
        ({"world_size": [1]}, "its number of parts"),
    ):
        change(file, fsdp_metadata=metadata | entries)
        assert main([str(file), str(parts / "out.pt")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("error:") == 1 and not (parts / "out.pt").exists()

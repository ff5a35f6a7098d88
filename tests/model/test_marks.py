"""Which parameters are decayed and which modules stay in fp32 is said by marks."""

import copy

import pytest
import torch
from torch import nn

from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.marks import block_matrices, decayed, keep_fp32, keeps_fp32, no_matrices, no_weight_decay


@pytest.mark.parametrize("kind", ["ema", "multi_ema"])
def test_matrices_are_decayed_and_what_belongs_to_momentum_is_not(kind):
    model = Decoder(DecoderConfig(50, 8, 8, 2, 2, momentum_kind=kind, momentum_gate="zero"))
    told = decayed(copy.deepcopy(model))
    assert told.keys() == dict(model.named_parameters()).keys()
    assert {name for name, does in told.items() if does} == {
        name for name, parameter in model.named_parameters() if parameter.dim() > 1 and ".momentum." not in name
    }
    assert told["layers.0.fc1.weight"]  # of 8 columns, as multi_ema's decays


def test_marks_outlive_a_parameter():
    layer = no_weight_decay(nn.Linear(8, 8), "weight")
    layer.load_state_dict({name: torch.zeros_like(value) for name, value in layer.state_dict().items()}, assign=True)
    assert decayed(nn.Sequential(layer, nn.Linear(3, 3))) == {
        "0.weight": False, "0.bias": False, "1.weight": True, "1.bias": False
    }  # fmt: skip
    assert decayed(layer) == {"weight": False, "bias": False}


@pytest.mark.parametrize("kind", ["ema", "multi_ema"])
def test_matrices_of_blocks_are_their_linear_layers(kind):
    model = Decoder(DecoderConfig(50, 8, 8, 2, 2, momentum_kind=kind, momentum_gate="zero", tie_embeddings=False))
    told = block_matrices(copy.deepcopy(model))
    assert told.keys() == dict(model.named_parameters()).keys()
    layers = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    assert {name.removesuffix(".weight").split(".")[-1] for name, is_one in told.items() if is_one} == set(layers)
    assert sum(told.values()) == 2 * len(layers) and all(name.startswith("layers.") for name in told if told[name])


def test_a_mark_or_another_place_makes_a_linear_layer_no_matrix():
    """The mark holds for all that is inside, lists of layers too."""
    marked = no_matrices(nn.Sequential(nn.ModuleList([nn.Linear(3, 3)])))
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), marked]), "out": nn.Linear(3, 3)})
    model["out"].weight = model["blocks"][1].weight
    assert [name for name, is_one in block_matrices(copy.deepcopy(model)).items() if is_one] == ["blocks.0.weight"]


def test_modules_that_stay_in_fp32():
    model = Decoder(DecoderConfig(50, 8, 8, 1, 2, momentum_kind="ema", momentum_learned=True, position="rotary"))
    kept = {name for name, module in model.named_modules() if keeps_fp32(module)}
    assert kept == {
        "layers.0.self_attn_layer_norm", "layers.0.final_layer_norm", "layers.0.self_attn.momentum", "layer_norm",
        "rotary"
    }  # fmt: skip
    assert keeps_fp32(copy.deepcopy(keep_fp32(nn.Linear(1, 1)))) and not keeps_fp32(nn.Linear(1, 1))

"""Which parameters are decayed and which modules stay in fp32 is said by marks."""

import copy

import pytest
import torch
from torch import nn

from momentum_lm.model import Decoder, DecoderConfig
from momentum_lm.model.marks import decayed, keep_fp32, keeps_fp32, no_weight_decay


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


def test_modules_that_stay_in_fp32():
    model = Decoder(DecoderConfig(50, 8, 8, 1, 2, momentum_kind="ema", momentum_learned=True, position="rotary"))
    kept = {name for name, module in model.named_modules() if keeps_fp32(module)}
    assert kept == {
        "layers.0.self_attn_layer_norm", "layers.0.final_layer_norm", "layers.0.self_attn.momentum", "layer_norm",
        "rotary"
    }  # fmt: skip
    assert keeps_fp32(copy.deepcopy(keep_fp32(nn.Linear(1, 1)))) and not keeps_fp32(nn.Linear(1, 1))

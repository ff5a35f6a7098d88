"""Whether a layer may be computed from its weight alone, or has to be called, because somebody added
something to it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether to call ``layer`` is to compute ``kind.forward`` with its own dense weight, and nothing else happens.

    Not so with hooks on it (pruning, offloading, tracing), hooks on all modules, another class in its place (LoRA,
    parametrizations, quantised layers), another ``forward``, its own compilation, or a weight that is a tensor of
    another kind (quantised, distributed).
    """
    return (
        type(layer) is kind
        and not any(getattr(layer, name) for name in _HOOKS)
        and not any(getattr(torch_module, f"_global{name}", None) for name in _HOOKS)
        and "forward" not in vars(layer)
        and layer._compiled_call_impl is None
        # the last: shapes without numbers, as planning uses
        and type(layer.weight) in (Tensor, nn.Parameter, FakeTensor)
    )

"""What an optimizer and mixed precision must know of a module: marks, so that nobody looks at its class or its shapes.

The marks lie on modules, and name parameters: a parameter itself is replaced when a model is copied, sharded or loaded.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def no_weight_decay(module: _Module, *names: str) -> _Module:
    """Marks parameters of ``module`` itself, by name, as ones that weight decay leaves alone. Returns the module.

    Biases and the weights of norms need no mark: what has one dimension is never decayed.
    """
    module.__dict__["_no_weight_decay"] = frozenset(names)
    return module


def decayed(model: nn.Module) -> dict[str, bool]:
    """Of each parameter, by its name as in ``model.named_parameters()``, whether weight decay applies to it."""
    marked = {
        f"{place}.{name}".lstrip(".")
        for place, module in model.named_modules()
        for name in getattr(module, "_no_weight_decay", ())
    }
    return {name: parameter.dim() > 1 and name not in marked for name, parameter in model.named_parameters()}


def no_matrices(module: _Module) -> _Module:
    """Marks ``module``, with all inside it, as one whose parameters are no matrices of a block, whatever their shapes:
    momentum, an output layer. Returns the module.
    """
    module.__dict__["_no_matrices"] = True
    return module


def block_matrices(model: nn.Module) -> dict[str, bool]:
    """Of each parameter, by its name as in ``model.named_parameters()``, whether it is a matrix of a block, whose
    gradient an optimizer such as Muon orthogonalises.

    That is the weight of an ``nn.Linear`` in a block (what the model keeps in ``nn.ModuleList``) where nothing around
    it is marked by :func:`no_matrices`, and which no other place of the model shares.
    """
    inside: set[nn.Parameter] = set()
    outside: set[nn.Parameter] = set()

    def visit(module: nn.Module, block: bool, marked: bool) -> None:
        marked = marked or getattr(module, "_no_matrices", False)
        for parameter in module.parameters(recurse=False):
            matrix = block and not marked and isinstance(module, nn.Linear) and parameter is module.weight
            (inside if matrix else outside).add(parameter)
        for child in module.children():
            visit(child, block or isinstance(module, nn.ModuleList), marked)

    visit(model, False, False)
    return {name: parameter in inside - outside for name, parameter in model.named_parameters()}


def keep_fp32(module: _Module) -> _Module:
    """Marks a module that mixed precision leaves in fp32, where a block's matrices are gathered and multiplied in half
    precision. Returns the module.
    """
    module.__dict__["_keeps_fp32"] = True
    return module


def keeps_fp32(module: nn.Module) -> bool:
    """Whether ``module`` is marked so (see :func:`keep_fp32`), or is a norm of torch's own, as autocast has it."""
    return getattr(module, "_keeps_fp32", False) or isinstance(module, (nn.LayerNorm, nn.RMSNorm))

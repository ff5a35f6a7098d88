"""``--optimizer fused_adamw``: AdamW in one kernel per device instead of fairseq's Python loop over parameters."""

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, List, Optional  # fairseq reads field types: no `from __future__ import annotations` here

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor, nn

from momentum_lm.errors import UserError, arg
from momentum_lm.model.filters import is_of_filter
from momentum_lm.model.marks import decayed


@dataclass
class FusedAdamWConfig(FairseqDataclass):
    adam_betas: Any = field(default="(0.9, 0.98)", metadata={"help": "betas"})
    adam_eps: float = field(default=1e-6, metadata={"help": "epsilon"})
    weight_decay: float = field(
        default=0.0,
        metadata={
            "help": "decoupled weight decay of matrices; biases, norms, momentum decays and gates are left alone"
        },
    )
    adam_backend: ChoiceEnum(["torch", "apex"]) = field(  # type: ignore[valid-type]
        default="torch", metadata={"help": "torch.optim.AdamW(fused=True), or NVIDIA apex's FusedAdam"}
    )
    momentum_lr: Optional[float] = field(
        default=None,
        metadata={
            "help": "learning rate of what momentum attention learns (decays, gates, weights of lags); the schedule "
            "scales it as it scales --lr (default: --lr)"
        },
    )
    lr: List[float] = II("optimization.lr")


_LEFT_ALONE = "no_weight_decay"
_OF_FILTER = "no_weight_decay, of a filter"


def mark_parameters(model: nn.Module) -> None:
    """Tells this optimizer which of the model's parameters weight decay leaves alone
    (:func:`momentum_lm.model.marks.decayed`), and which of these momentum attention learns.
    """
    applies = decayed(model)
    for name, parameter in model.named_parameters():
        if not applies[name]:  # fairseq's fp32 copies of parameters keep this attribute
            parameter.param_group = _OF_FILTER if is_of_filter(name) else _LEFT_ALONE  # type: ignore[attr-defined]


def _is_decayed(parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and getattr(parameter, "param_group", None) not in (_LEFT_ALONE, _OF_FILTER)


def _is_of_filter(parameter: Tensor) -> bool:
    return getattr(parameter, "param_group", None) == _OF_FILTER


def _multiply(tensors: list[Tensor], factor: float | Tensor) -> None:
    """In place; in one kernel where torch has it, which it calls private."""
    if hasattr(torch, "_foreach_mul_"):
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def _is_divided(tensor: Any) -> bool:
    """Whether it is a DTensor. To import that class would take every fairseq command half a second."""
    return hasattr(tensor, "to_local")


@register_optimizer("fused_adamw", dataclass=FusedAdamWConfig)
class FusedAdamW(FairseqOptimizer):
    """AdamW (arXiv 1711.05101). Weight decay applies to what has two dimensions or more and is not marked (see
    :func:`mark_parameters`). The learning rate of what momentum attention learns is at every update ``--momentum-lr`` /
    ``--lr`` (the first one) times that of the schedule, if given. Raises UserError for impossible flags.
    """

    def __init__(self, cfg: Any, params: Iterable[Any]) -> None:
        super().__init__(cfg)
        params = list(params)
        if cfg.weight_decay and all(p.dim() < 2 for p in params):
            raise UserError(
                "--weight-decay with --fp16 needs --fp16-no-flatten-grads: in a flat buffer matrices and biases look "
                "alike"
            )
        self._optimizer = self._adamw(params)

    @classmethod
    def prepare(cls, cfg: Any, model: nn.Module) -> None:
        """What has to be known of the whole command ``cfg`` and of the model before fairseq builds an optimizer, to
        which it gives parameters alone.
        """
        mark_parameters(model)

    def _adamw(self, params: list[Any]) -> torch.optim.Optimizer:
        """Of any ``params``, none included."""
        own = self._of_filters(params)
        rest = [p for p in params if not _is_decayed(p) and not (own and _is_of_filter(p))]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if _is_decayed(p)]},
            {"params": rest, "weight_decay": 0.0},
            {"params": own, "weight_decay": 0.0, "lr": self.cfg.momentum_lr},
        ]
        groups = [group for group in groups if group["params"]] or groups[:1]
        if self.cfg.adam_backend == "apex":
            try:
                from apex.optimizers import FusedAdam
            except ImportError:
                raise UserError(
                    "--adam-backend apex: NVIDIA apex is not installed (github.com/NVIDIA/apex; not PyPI's apex); use "
                    "torch"
                ) from None
            return FusedAdam(groups, **self.optimizer_config)
        return torch.optim.AdamW(groups, fused=True, **self.optimizer_config)

    def _of_filters(self, params: list[Any]) -> list[Any]:
        """What has a learning rate of its own."""
        rate, base = self.cfg.momentum_lr, self.optimizer_config["lr"]
        if rate is None:
            return []
        if not rate >= 0:
            raise UserError(arg(momentum_lr=rate), ": must not be negative")
        if base <= 0:
            raise UserError(arg(lr=base), ": must be positive with ", arg(momentum_lr=rate), ", which goes with it")
        own = [p for p in params if _is_of_filter(p)]
        if not own:
            raise UserError(
                arg(momentum_lr=rate), ": this model's momentum learns nothing, or is in a flat buffer: leave it out, "
                "or add --momentum-learned or --momentum-gate zero, and with --fp16 --fp16-no-flatten-grads"
            )  # fmt: skip
        return own

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group.update(self._settings_of(group, {"lr": lr}))

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """What overrides a checkpoint's settings, as in fairseq's Adam; weight decay belongs to the
        parameter groups.
        """
        betas = self.cfg.adam_betas
        try:
            betas = tuple(float(b) for b in (ast.literal_eval(betas) if isinstance(betas, str) else betas))
            if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
                raise ValueError
        except (ValueError, SyntaxError, TypeError):
            raise UserError(
                f"--adam-betas {self.cfg.adam_betas!r}: two numbers in [0, 1) are needed, such as '(0.9, 0.98)'"
            ) from None
        lr = self.cfg.lr[0] if not isinstance(self.cfg.lr, float) else self.cfg.lr
        return {"lr": lr, "betas": betas, "eps": self.cfg.adam_eps, "weight_decay": self.cfg.weight_decay}

    def load_state_dict(self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
        if any(_is_divided(p) for p in self.params):
            state_dict = self._parts(state_dict)
        groups = state_dict.get("param_groups") or self.param_groups
        if len(groups) != len(self.param_groups) and any(map(_is_of_filter, self.params)):
            raise UserError(
                "the checkpoint's optimizer has other groups of parameters: go on with or without ", arg("momentum_lr"),
                ", as it was begun, or add ", arg(reset_optimizer=True),
            )  # fmt: skip
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.update(self._settings_of(group, optimizer_overrides or {}))

    def _settings_of(self, group: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Those of ``settings``, given for all parameters, that a group has."""
        if any(_is_decayed(p) for p in group["params"]):
            return settings
        own = {name: value for name, value in settings.items() if name != "weight_decay"}
        if "lr" in own and self.cfg.momentum_lr is not None and any(_is_of_filter(p) for p in group["params"]):
            own["lr"] *= self.cfg.momentum_lr / self.optimizer_config["lr"]
        return own

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Asked by --memory-efficient-fp16 and -bf16 alone, to which it answers with UserError: its averages would be
        in half precision.
        """
        raise UserError(
            "--memory-efficient-fp16 and --memory-efficient-bf16 do not go with --optimizer fused_adamw: use --task "
            "momentum_language_modeling --autocast bf16, or --fp16, or --bf16, or --optimizer adam"
        )

    @property
    def supports_flat_params(self) -> bool:
        return True

    def multiply_grads(self, c: float | Tensor) -> None:
        grads = self._grads()
        if grads:
            _multiply(grads, c.to(grads[0]) if isinstance(c, Tensor) else c)

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Norm of all gradients, computed without a loop; scales them if it exceeds ``max_norm`` > 0."""
        grads = self._grads()
        if not grads:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm(grads)
        if aggregate_norm_fn is not None:
            norm = aggregate_norm_fn(norm)
        if max_norm > 0:
            _multiply(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _grads(self) -> list[Tensor]:
        """Of fully sharded parameters this process's part, without a copy."""
        grads = [p.grad for p in self.params if p.grad is not None]
        return [g.to_local() if _is_divided(g) else g for g in grads]

    def _parts(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state whose tensors are divided as the parameters are; it may hold whole ones or this process's parts."""
        from momentum_lm.fairseq_plugin.sharding import part_like

        params = [p for group in self.param_groups for p in group["params"]]
        state = {
            index: {key: part_like(value, params[index]) if value.dim() else value for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

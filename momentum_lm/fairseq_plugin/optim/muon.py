"""``--optimizer muon``: Muon for the matrices of the blocks, AdamW for everything else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Optional  # fairseq reads field types: no `from __future__ import annotations` here

import torch
from fairseq.modules import AdaptiveInput, AdaptiveSoftmax, CharacterTokenEmbedder
from fairseq.optim import FairseqOptimizer, register_optimizer
from torch import Tensor, nn

from momentum_lm.errors import UserError, arg
from momentum_lm.model.marks import block_matrices, decayed, no_matrices

from .fused_adamw import FusedAdamW, FusedAdamWConfig


@dataclass
class MuonConfig(FusedAdamWConfig):
    muon_lr: float = field(
        default=0.02,
        metadata={"help": "learning rate of the blocks' matrices; the schedule scales it as it scales --lr"},
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Nesterov momentum of the blocks' matrices"})
    muon_weight_decay: Optional[float] = field(
        default=None, metadata={"help": "decoupled weight decay of the blocks' matrices (default: --weight-decay)"}
    )


_MATRIX = "matrix of a block"
# fairseq's layers that embed or predict tokens and keep linear layers in lists, as models keep their blocks
_NO_BLOCKS = (AdaptiveInput, AdaptiveSoftmax, CharacterTokenEmbedder)
_BACKENDS = ("pytorch_ddp", "c10d", "legacy_ddp", "no_c10d")


def mark_matrices(model: nn.Module) -> None:
    """Tells this optimizer which of the model's parameters are Muon's (:func:`momentum_lm.model.marks.block_matrices`);
    what weight decay leaves alone is not.
    """
    for module in model.modules():
        if isinstance(module, _NO_BLOCKS):
            no_matrices(module)
    matrices, applies = block_matrices(model), decayed(model)
    for name, parameter in model.named_parameters():
        if matrices[name] and applies[name]:
            parameter.param_group = _MATRIX  # type: ignore[attr-defined]


def _is_matrix(parameter: Tensor) -> bool:
    return getattr(parameter, "param_group", None) == _MATRIX


class _MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers of different parameters as one: its groups are theirs, and so is its state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.__setstate__({"param_groups": self.param_groups[start:end], "state": self.state})
            start = end

    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


@register_optimizer("muon", dataclass=MuonConfig)
class Muon(FusedAdamW):
    """torch.optim.Muon (momentum orthogonalised by Newton-Schulz iterations; kellerjordan.github.io/posts/muon) for
    what :func:`mark_matrices` marked, and :class:`FusedAdamW`'s AdamW for the rest.

    The matrices' learning rate is at every update ``--muon-lr`` / ``--lr`` (the first one) times that of the schedule.
    Raises UserError for impossible flags, and where no parameter is marked.
    """

    def __init__(self, cfg: Any, params: Iterable[Any]) -> None:
        FairseqOptimizer.__init__(self, cfg)
        params = list(params)
        _check_settings(cfg)
        matrices = [p for p in params if _is_matrix(p)]
        if not matrices:
            raise UserError(
                "--optimizer muon finds no matrices to train: no nn.Linear in an nn.ModuleList of the model; use "
                "--optimizer fused_adamw"
            )
        rate = self.optimizer_config["lr"]
        if rate <= 0:
            raise UserError(arg(lr=rate), ": must be positive with --optimizer muon, whose other rate goes with it")
        self._ratio = cfg.muon_lr / rate
        decay = cfg.weight_decay if cfg.muon_weight_decay is None else cfg.muon_weight_decay
        muon = torch.optim.Muon(matrices, lr=cfg.muon_lr, momentum=cfg.muon_momentum, weight_decay=decay)
        self._optimizer = _MuonAndAdamW(self._adamw([p for p in params if not _is_matrix(p)]), muon)

    @classmethod
    def prepare(cls, cfg: Any, model: nn.Module) -> None:
        """Marks what this optimizer must know. Raises UserError for options of the command ``cfg`` that do not go with
        it.
        """
        _check_options(cfg)
        super().prepare(cfg, model)
        mark_matrices(model)

    def _settings_of(self, group: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        if "ns_steps" not in group:
            return super()._settings_of(group, settings)
        own = {}
        if "lr" in settings:
            own["lr"] = settings["lr"] * self._ratio
        if "weight_decay" in settings and self.cfg.muon_weight_decay is None:
            own["weight_decay"] = settings["weight_decay"]
        return own

    @property
    def supports_flat_params(self) -> bool:
        return False


def _check_settings(cfg: Any) -> None:
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--optimizer muon needs torch 2.9 or later, and this is {torch.__version__}: upgrade torch, or use "
            "--optimizer fused_adamw"
        )
    if not cfg.muon_lr > 0:
        raise UserError(arg(muon_lr=cfg.muon_lr), ": must be positive")
    if not 0 <= cfg.muon_momentum < 1:
        raise UserError(arg(muon_momentum=cfg.muon_momentum), ": must be at least 0 and less than 1")
    if cfg.muon_weight_decay is not None and not cfg.muon_weight_decay >= 0:
        raise UserError(arg(muon_weight_decay=cfg.muon_weight_decay), ": must not be negative")


def _check_options(cfg: Any) -> None:
    """Raises UserError for what hands out a matrix in pieces or flattened, or scales gradients by itself."""
    common, backend = cfg.common, cfg.distributed_training.ddp_backend
    unsupported = {
        "--memory-efficient-fp16": common.memory_efficient_fp16,
        "--memory-efficient-bf16": common.memory_efficient_bf16,
        "--fp16": common.fp16,
        "--amp": common.amp,
        "--use-bmuf": cfg.optimization.use_bmuf,
        f"--zero-sharding {cfg.distributed_training.zero_sharding}": cfg.distributed_training.zero_sharding != "none",
        f"--ddp-backend {backend}": backend not in _BACKENDS,
    }
    for flag, given in unsupported.items():
        if given:
            raise UserError(
                f"{flag} does not go with --optimizer muon; leave it out (half precision: --bf16, or --task "
                "momentum_language_modeling --autocast bf16), or use --optimizer fused_adamw"
            )

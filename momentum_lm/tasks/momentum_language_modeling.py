"""``--task momentum_language_modeling``: fairseq's language modelling with bf16 autocast, packed documents and more to look at."""

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.data.indexed_dataset import infer_dataset_impl
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import II

from momentum_lm.data.indexed import IndexedDataset
from momentum_lm.errors import UserError
from momentum_lm.modules.decoder import document_ids

from .monitor import TrainingMonitor


@dataclass
class MomentumLanguageModelingConfig(LanguageModelingConfig):
    packed_documents: bool = field(
        default=False,
        metadata={"help": "neither attention nor momentum crosses a document boundary (the end-of-sentence token) within a sample"},
    )
    autocast: ChoiceEnum(["auto", "bf16", "none"]) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={"help": "compute in bf16 with fp32 weights; auto: on GPUs that have bf16, unless --fp16, --bf16 or --amp is given"},
    )
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    amp: bool = II("common.amp")
    cpu: bool = II("common.cpu")
    log_interval: int = II("common.log_interval")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")


@register_task("momentum_language_modeling", dataclass=MomentumLanguageModelingConfig)
class MomentumLanguageModelingTask(LanguageModelingTask):
    """Takes the data that ``language_modeling`` takes."""

    def __init__(self, args: Any, dictionary: Any, output_dictionary: Any = None, targets: Any = None) -> None:
        super().__init__(args, dictionary, output_dictionary, targets)
        self.monitor: TrainingMonitor | None = None

    @classmethod
    def setup_dictionary(cls, args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for folder in utils.split_paths(args.data)[:1]:
            if not os.path.isfile(os.path.join(folder, "dict.txt")):
                raise UserError(f"{folder} holds no dict.txt; make data with `momentum-lm prepare` or `fairseq-preprocess --only-source`")
        return super().setup_dictionary(args, **kwargs)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """As fairseq's. Raises UserError naming the file where data is missing, cut short, damaged or empty."""
        paths = utils.split_paths(self.args.data)
        prefix = os.path.join(paths[(epoch - 1) % len(paths)], split)
        if infer_dataset_impl(prefix) in (None, "mmap") and IndexedDataset(prefix).num_tokens == 0:
            raise UserError(f"{prefix}.bin holds no tokens; make it anew from text that is not empty")
        return super().load_dataset(split, epoch, combine, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        model = super().build_model(cfg, from_checkpoint)
        self.monitor = TrainingMonitor(model, cfg, self.args)
        return model

    def train_step(
        self,
        sample: dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        assert self.monitor is not None
        self.monitor.before_step(update_num)
        with self._precision(sample):
            result = super().train_step(self._packed(sample), model, criterion, optimizer, update_num, ignore_grad)
        for name, value in self.monitor.after_step(sample["ntokens"]).items():
            metrics.log_scalar(name, value, priority=1500, round=4)
        return result

    def valid_step(self, sample: dict[str, Any], model: Any, criterion: Any) -> tuple[torch.Tensor, int, dict[str, Any]]:
        with self._precision(sample):
            return super().valid_step(self._packed(sample), model, criterion)

    def _packed(self, sample: dict[str, Any]) -> dict[str, Any]:
        if not self.args.packed_documents:
            return sample
        tokens = sample["net_input"]["src_tokens"]
        return {
            **sample,
            "net_input": {**sample["net_input"], "segment_ids": document_ids(tokens, self.dictionary.eos())},
        }

    def _precision(self, sample: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        device = sample["net_input"]["src_tokens"].device.type
        args = self.args
        plain = not (args.fp16 or args.bf16 or args.amp)
        on = args.autocast == "bf16" or (args.autocast == "auto" and plain and device == "cuda" and torch.cuda.is_bf16_supported())
        return torch.autocast(device, torch.bfloat16) if on else contextlib.nullcontext()

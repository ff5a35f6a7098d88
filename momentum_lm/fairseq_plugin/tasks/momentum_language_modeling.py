"""``--task momentum_language_modeling``: fairseq's language modelling with bf16 autocast, packed documents and more to
look at.

``--icl-eval-datasets mr,trec --icl-eval-interval 1000`` evaluates in-context classification while the model trains.
"""

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics, progress_bar
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import II

from momentum_lm.errors import UserError
from momentum_lm.model.positions import document_ids
from momentum_lm.model.sizes import OURS

from .monitor import TrainingMonitor
from .token_data import TokenDataTask


@dataclass
class MomentumLanguageModelingConfig(LanguageModelingConfig):
    packed_documents: bool = field(
        default=False,
        metadata={
            "help": "neither attention nor momentum crosses a document boundary (the end-of-sentence token) within a "
            "sample"
        },
    )
    autocast: ChoiceEnum(["auto", "bf16", "none"]) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "compute in bf16 with fp32 weights; auto: on GPUs that have bf16, unless --fp16, --bf16 or --amp "
            "is given"
        },
    )
    icl_eval_datasets: Optional[str] = field(
        default=None,
        metadata={
            "help": "evaluate in-context classification during training, on these data sets (as --datasets of "
            "fairseq-eval)"
        },
    )
    icl_eval_interval: int = field(default=1000, metadata={"help": "evaluate after every N updates"})
    icl_eval_shots: str = field(default="0,4", metadata={"help": "demonstrations in a prompt: one number or more"})
    icl_eval_seeds: str = field(
        default="1", metadata={"help": "of the draws of demonstrations; accuracies are means over them"}
    )
    icl_eval_limit: int = field(
        default=200, metadata={"help": "evaluate at most N examples of each data set, a seeded sample"}
    )
    icl_eval_data_dir: Optional[str] = field(
        default=None,
        metadata={"help": "use DIR/<dataset>/{train,validation}.{jsonl,csv,parquet} where it is there, not the hub"},
    )
    icl_eval_sampling: ChoiceEnum(["random", "balanced"]) = field(  # type: ignore[valid-type]
        default="random", metadata={"help": "balanced: as many demonstrations of each label"}
    )
    icl_eval_max_field_tokens: Optional[int] = field(
        default=None, metadata={"help": "shorten each text of the data to N tokens"}
    )
    fp16: bool = II("common.fp16")
    bf16: bool = II("common.bf16")
    amp: bool = II("common.amp")
    cpu: bool = II("common.cpu")
    log_interval: int = II("common.log_interval")
    log_format: Optional[str] = II("common.log_format")
    no_progress_bar: bool = II("common.no_progress_bar")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")
    wandb_project: Optional[str] = II("common.wandb_project")
    max_tokens: Optional[int] = II("dataset.max_tokens")
    train_subset: str = II("dataset.train_subset")
    ddp_backend: str = II("distributed_training.ddp_backend")


@register_task("momentum_language_modeling", dataclass=MomentumLanguageModelingConfig)
class MomentumLanguageModelingTask(TokenDataTask):
    """Takes the data that ``language_modeling`` takes."""

    def __init__(self, args: Any, dictionary: Any, output_dictionary: Any = None, targets: Any = None) -> None:
        super().__init__(args, dictionary, output_dictionary, targets)
        self.monitor: TrainingMonitor | None = None
        self.icl_evaluation: Any = None

    @classmethod
    def setup_dictionary(cls, args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for folder in utils.split_paths(args.data)[:1]:
            if not os.path.isfile(os.path.join(folder, "dict.txt")):
                raise UserError(
                    f"{folder} holds no dict.txt; make data with `momentum-lm prepare` or `fairseq-preprocess "
                    "--only-source`"
                )
        return super().setup_dictionary(args, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """As fairseq's. Raises UserError for a model that cannot keep documents apart, and is asked to."""
        from momentum_lm.fairseq_plugin.models import MomentumLanguageModel

        model = super().build_model(cfg, from_checkpoint)
        if self.args.packed_documents and not isinstance(model, MomentumLanguageModel):
            raise UserError(f"--packed-documents works with --arch {OURS}; leave it out, or choose one of these")
        self.monitor = TrainingMonitor(model, cfg, self.args)
        if self.args.icl_eval_datasets and not from_checkpoint:  # those are evaluated, not trained
            if self.args.ddp_backend == "fully_sharded":
                raise UserError(
                    "--icl-eval-datasets does not go with --ddp-backend fully_sharded: evaluate checkpoints with "
                    "fairseq-eval"
                )
            from .icl_evaluation import IclEvaluation

            self.icl_evaluation = IclEvaluation(model, self.args)
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
        self.monitor.before_step(update_num, optimizer)
        model.train()
        model.set_num_updates(update_num)
        # fairseq's train_step switches autocast off for the forward pass, and would leave it on for the backward pass.
        with torch.autograd.profiler.record_function("forward"), self._training_precision(_device(sample), optimizer):
            result = loss, _, _ = criterion(model, self._packed(sample))
        if ignore_grad:
            loss *= 0
        with torch.autograd.profiler.record_function("backward"):
            optimizer.backward(loss)
        for name, value in self.monitor.after_step(sample["ntokens"]).items():
            metrics.log_scalar(name, value, priority=1500, round=4)
        return result

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        super().optimizer_step(optimizer, model, update_num)
        if self.icl_evaluation is not None and self.icl_evaluation.due(update_num + 1):
            assert self.monitor is not None
            began = time.monotonic()
            with self._training_precision(self.icl_evaluation.lm.device.type, optimizer):
                values = self.icl_evaluation()
            self._log_evaluation(values, update_num + 1)
            self.monitor.leave_out(time.monotonic() - began)

    def _log_evaluation(self, values: dict[str, float], update: int) -> None:
        """A line of fairseq's log, its TensorBoard (the run ``icl``) and ours, by the first process alone."""
        assert self.monitor is not None
        if distributed_utils.get_global_rank() != 0:
            return
        args = self.args
        bar = progress_bar.progress_bar(
            [],
            log_format=args.log_format,
            prefix=f"update {update}",
            tensorboard_logdir=args.tensorboard_logdir and os.path.join(args.tensorboard_logdir, "icl"),
            default_log_format="simple" if args.no_progress_bar else "tqdm",
            wandb_project=args.wandb_project,
        )
        with progress_bar.rename_logger(progress_bar.logger, "icl"):
            bar.print({**values, "num_updates": update}, step=update)
        self.monitor.record(values, update)

    def valid_step(
        self, sample: dict[str, Any], model: Any, criterion: Any
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        with self._precision(_device(sample)):
            return super().valid_step(self._packed(sample), model, criterion)

    def filter_indices_by_size(
        self, indices: Any, dataset: Any, max_positions: Any = None, ignore_invalid_inputs: bool = False
    ) -> Any:
        """As fairseq's. Raises UserError for a sample that is longer than the model takes, unless such are to be left
        out.
        """
        if ignore_invalid_inputs:
            return super().filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs)
        kept, long = dataset.filter_indices_by_size(indices, max_positions)
        if len(long):
            raise UserError(
                f"sample {long[0]} has {dataset.size(long[0])} tokens, </s> or <s> included, and the model takes "
                f"{max_positions}: "
                "shorten it, or leave such samples out with --skip-invalid-size-inputs-valid-test"
            )
        return kept

    def inference_step(
        self,
        generator: Any,
        models: Any,
        sample: dict[str, Any],
        prefix_tokens: torch.Tensor | None = None,
        constraints: Any = None,
    ) -> Any:
        """As fairseq's, but a prompt's limits are its own: fairseq's are those of the batch's longest prompt, and a
        token more.

        Raises UserError for a prompt that would not come out whole: fairseq's limits count its tokens too.
        """
        if not hasattr(generator, "max_len_a"):  # a scorer of given text
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        tokens = sample["net_input"]["src_tokens"]
        if prefix_tokens is not None:
            _check_room(generator, prefix_tokens.shape[1], tokens.shape[1])
            return super().inference_step(generator, models, sample, prefix_tokens, constraints)
        lengths = sample["net_input"]["src_lengths"].tolist()
        found: list[Any] = [None] * len(lengths)
        for length in sorted(set(lengths), reverse=True):
            rows = [row for row, other in enumerate(lengths) if other == length]
            prompts = tokens[rows, 1:length]  # the first token is </s> or <s>
            _check_room(generator, length - 1, length - 1)
            alike = {"net_input": {"src_tokens": prompts, "src_lengths": prompts.new_full((len(rows),), length - 1)}}
            for row, hypotheses in zip(
                rows, super().inference_step(generator, models, alike, prompts, constraints), strict=True
            ):
                found[row] = hypotheses
        return found

    def _packed(self, sample: dict[str, Any]) -> dict[str, Any]:
        if not self.args.packed_documents:
            return sample
        tokens = sample["net_input"]["src_tokens"]
        return {
            **sample,
            "net_input": {**sample["net_input"], "segment_ids": document_ids(tokens, self.dictionary.eos())},
        }

    def _training_precision(self, device: str, optimizer: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cuda") if isinstance(optimizer, AMPOptimizer) else self._precision(device)

    def autocast_dtype(self, device: str) -> torch.dtype | None:
        """What matrix products are computed in on ``device`` ("cpu", "cuda"), or None: as the weights are."""
        args = self.args
        plain = not (args.fp16 or args.bf16 or args.amp)
        # emulated, as before Ampere, it would be slower than fp32
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        on = args.autocast == "bf16" or (args.autocast == "auto" and plain and fast)
        return torch.bfloat16 if on else None

    def _precision(self, device: str) -> contextlib.AbstractContextManager[Any]:
        dtype = self.autocast_dtype(device)
        return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _device(sample: dict[str, Any]) -> str:
    return sample["net_input"]["src_tokens"].device.type


def _check_room(generator: Any, prompt: int, length: int) -> None:
    """Whether a generator of fairseq goes on after a prompt of so many tokens, where its limits come
    from ``length``.
    """
    limit = int(generator.max_len_a * length + generator.max_len_b)
    if prompt >= min(limit, generator.max_len - 1):
        remedy = (
            "give --max-len-a 1, and --max-len-b counts new tokens only"
            if prompt < generator.max_len - 1
            else "shorten it"
        )
        raise UserError(
            f"a prompt of {prompt} tokens leaves no room for new ones: the model takes {generator.max_len}, "
            f"and --max-len-a {generator.max_len_a:g} --max-len-b {generator.max_len_b} allow {limit}; {remedy}"
        )

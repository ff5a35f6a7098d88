"""fairseq's trainer, with what long runs on many machines need: FSDP2, and an answer to bad batches, torn checkpoints
and preemption.
"""

import functools
import json
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer as FairseqTrainer
from torch import Tensor

from momentum_lm.cpu import keep_memory
from momentum_lm.errors import CheckpointError, TornCheckpoint, UserError
from momentum_lm.fairseq_plugin import lock
from momentum_lm.formats.checkpoint import load_checkpoint
from momentum_lm.model.config import BUILT_IN_FILTERS
from momentum_lm.text.dictionary import DIGEST, check_symbols, symbols_digest

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SKIPS_IN_A_ROW = 5  # then the run stops
RECOVERY = 50  # updates without a bad batch after which a halved learning rate is doubled again


class _BadBatch(Exception):
    """The gradient of a batch is not finite. Not one of the errors that fairseq's train_step handles itself."""


class Trainer(FairseqTrainer):
    """Everything that fairseq's does, and:

    - ``--ddp-backend fully_sharded`` through :class:`~momentum_lm.fairseq_plugin.sharding.FullySharded`;
    - a batch whose gradient is not finite is left out and written down in ``SAVE_DIR/bad_batches.jsonl``, and the
      learning rate halved for a while; after ``SKIPS_IN_A_ROW`` of them the run ends (with --fp16 and --amp the loss
      scale is lowered instead, as in fairseq);
    - SIGTERM or SIGUSR1 ends the run after the current update, with a checkpoint; a second one at once;
    - where the run's last checkpoint is torn or missing, the one of the most updates is taken of those that are whole;
    - a run that is over trains no more, and leaves its checkpoints as they are;
    - one training at a time writes into SAVE_DIR;
    - weights that were trained with another dictionary are refused.

    All of this for our models, our tasks and ``--ddp-backend fully_sharded``. Anything else gets fairseq's own trainer.
    """

    _ready = False

    def __new__(cls, cfg: Any, task: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        _prepare_optimizer(cfg, model)
        if cls is Trainer and not _is_ours(cfg, task, model):
            return FairseqTrainer(cfg, task, model, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, cfg: Any, task: Any, model: Any, criterion: Any, quantizer: Any = None) -> None:
        if cfg.distributed_training.ddp_backend == "fully_sharded":
            _check_sharded_options(cfg)
        self.skipped = {"in_a_row": 0, "halvings": 0, "finite_since": 0}
        self._whole_rate: float | None = None  # what the schedule says, while the learning rate is halved
        self.signalled = False  # this process got a signal
        self.stopping = False  # and now every process knows
        self._config_of_stop: dict[str, Any] = {}
        super().__init__(cfg, task, model, criterion, quantizer)
        self._ready = True  # fairseq's constructor would look for fairscale
        if not self.cuda:
            keep_memory()
        if self.is_fsdp:
            # each reads what it needs of the file itself, instead of the first sending all of it to all
            cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        if not cfg.checkpoint.no_save:
            self._from_first(self._hold_save_dir)
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    def _hold_save_dir(self) -> None:
        if os.path.isdir(self.cfg.checkpoint.save_dir):
            lock.hold(self.cfg.checkpoint.save_dir)

    # Fully sharded

    @property
    def is_fsdp(self) -> bool:
        return self._ready and super().is_fsdp and self.data_parallel_world_size > 1

    @property
    def model(self) -> Any:
        if self._wrapped_model is None and self.is_fsdp:  # type: ignore[has-type]
            from .sharding import FullySharded

            options = self.cfg.distributed_training
            precision = getattr(self.task, "autocast_dtype", None)
            self._wrapped_model = FullySharded(
                self._model,
                self.data_parallel_process_group,
                self.device,
                None if precision is None else precision(self.device.type),
                options.use_sharded_state,
                not options.no_reshard_after_forward,
            )
        return super().model

    def _build_optimizer(self) -> None:
        if self.is_fsdp:  # the parts are other parameters than those that were marked
            _prepare_optimizer(self.cfg, self.model)
        super()._build_optimizer()
        if self.is_fsdp and type(self._optimizer).__name__ != "FusedAdamW":
            raise UserError("--ddp-backend fully_sharded works with --optimizer fused_adamw")

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """The norm of the gradient of all processes, on the CPU. Raises _BadBatch if it is not finite."""

        def over_processes(norm: Tensor) -> Tensor:
            square = norm.to(self.device).float() ** 2
            dist.all_reduce(square, group=self.data_parallel_process_group)
            return square.sqrt()

        half = self.cfg.common.fp16 or self.cfg.common.amp
        try:
            norm = self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=over_processes if self.is_fsdp else None)
        except OverflowError as error:  # fairseq would go on to a GPU that may not be there
            logger.info(f"gradient overflow: {error}")
            raise _BadBatch from error
        if half:
            return norm
        norm = norm.cpu()  # one wait for the device: fairseq asks several times
        if not math.isfinite(norm):
            raise _BadBatch
        return norm

    def _check_grad_norms(self, grad_norm: Tensor) -> None:
        if self.get_num_updates() % self.cfg.common.log_interval == 0:
            super()._check_grad_norms(grad_norm.to(self.device))

    # Bad batches

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        try:
            # alone, fairseq leaves out a batch that does not fit; of several processes one would leave the others
            # waiting
            output = super().train_step(samples, raise_oom or self.data_parallel_world_size > 1)
        except _BadBatch as error:
            self.zero_grad()
            if getattr(self.optimizer, "scaler", 0) is None:  # --bf16: its zero_grad forgets this
                self.optimizer._multiply_factor = 1.0
            if error.__cause__ is None:  # no matter of loss scale
                self._after_bad_batch(samples)
            output = None
        else:
            self._after_good_batch()
        if self.data_parallel_world_size == 1:
            self.stopping = self.signalled
        if self.stopping and not self._config_of_stop:
            self._stop_after_this_update()
        return output

    def _after_bad_batch(self, samples: list[Any]) -> None:
        skipped = self.skipped
        skipped.update(in_a_row=skipped["in_a_row"] + 1, halvings=skipped["halvings"] + 1, finite_since=0)
        ids = [int(i) for sample in samples if sample for i in sample.get("id", [])]
        os.makedirs(self.cfg.checkpoint.save_dir, exist_ok=True)  # only the first process's machine has it for sure
        path = os.path.join(self.cfg.checkpoint.save_dir, "bad_batches.jsonl")
        record = {"update": self.get_num_updates(), "process": self.data_parallel_rank, "ids": ids}
        with open(
            path, "a", encoding="utf-8"
        ) as file:  # one short line, appended: processes of one machine do not mix theirs
            file.write(json.dumps(record) + "\n")
        self.lr_step_update()
        what = (
            f"the gradient at update {record['update']} is not finite (NaN or infinity); samples are listed in {path}"
        )
        if skipped["in_a_row"] >= SKIPS_IN_A_ROW:
            raise UserError(
                f"{what}; {SKIPS_IN_A_ROW} batches in a row: stopped. Lower --lr, raise --warmup-updates, or look at "
                "the data"
            )
        logger.warning(f"{what}; batch left out, learning rate halved to {self.get_lr():.3g} for {RECOVERY} updates")

    def _after_good_batch(self) -> None:
        skipped = self.skipped
        skipped["in_a_row"] = 0
        if skipped["halvings"]:
            skipped["finite_since"] += 1
            if skipped["finite_since"] == RECOVERY:
                skipped.update(halvings=skipped["halvings"] - 1, finite_since=0)
                self.lr_step_update()

    def lr_step_update(self) -> Any:
        if self._whole_rate is not None:
            self.optimizer.set_lr(self._whole_rate)  # some schedules only read it
            self._whole_rate = None
        rate = super().lr_step_update()
        if self.skipped["halvings"]:
            self._whole_rate = self.optimizer.get_lr()
            self.optimizer.set_lr(self._whole_rate / 2 ** self.skipped["halvings"])
            metrics.log_scalar("lr", self.optimizer.get_lr(), weight=0, priority=300)
        return rate

    # Preemption

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)

    def _aggregate_logging_outputs(self, logging_outputs: list[Any], *sums: Any, ignore: bool = False) -> Any:
        """fairseq's sum over processes, once in an update; here it also tells all of them whether one got a signal."""
        outputs, (*totals, signalled) = super()._aggregate_logging_outputs(
            logging_outputs, *sums, float(self.signalled), ignore=ignore
        )
        self.stopping = bool(signalled > 0)
        return outputs, totals

    def _stop_after_this_update(self) -> None:
        """fairseq's loop ends, and saves, at the last update; validation would take time that may not be left."""
        logger.info("got a signal to stop: saving a checkpoint, then the end")
        cfg = self.cfg
        self._config_of_stop = {
            "optimization": {"max_update": cfg.optimization.max_update},
            "dataset": {"disable_validation": cfg.dataset.disable_validation},
            "checkpoint": {"no_last_checkpoints": cfg.checkpoint.no_last_checkpoints},
        }
        cfg.optimization.max_update = max(1, self.get_num_updates())
        cfg.dataset.disable_validation = True
        cfg.checkpoint.no_last_checkpoints = False

    def state_dict(self) -> dict[str, Any]:
        rate = self.optimizer.get_lr()
        if self._whole_rate is not None:  # what a checkpoint holds is the schedule's
            self.optimizer.set_lr(self._whole_rate)
        state = super().state_dict()
        if self._whole_rate is not None:
            self.optimizer.set_lr(rate)
        for group, values in self._config_of_stop.items():
            state["cfg"][group].update(values)
        state["extra_state"]["skipped"] = self.skipped
        state["extra_state"]["early_stop"] = _counts(vars(_early_stop()))
        if isinstance(self.task, LanguageModelingTask):
            state["task_state"] = {**state["task_state"], DIGEST: symbols_digest(self.task.source_dictionary.symbols)}
        return state

    # Checkpoints

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        if self.is_fsdp and sys.exc_info()[0] is not None:
            return  # crash.pt: gathering the parts takes all processes, and this one alone failed
        super().save_checkpoint(filename, extra_state)

    def consolidate_optimizer(self) -> None:
        if not self.is_fsdp:
            super().consolidate_optimizer()
        elif sys.exc_info()[0] is None and not self.cfg.checkpoint.no_save_optimizer_state:
            self._gathered_optim_state = self.model.gather_full_optim_state_dict(self.optimizer)

    def load_checkpoint(
        self, filename: str, reset_optimizer: bool = False, reset_lr_scheduler: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """As fairseq's, but takes the newest whole one where the run's last is torn or missing, and says so; and sees
        to it that a run that is over does not go on.

        Raises CheckpointError if none is whole or --restore-file does not exist, UserError if only parts for another
        number of processes are there, for weights of another dictionary, and for a --restore-file that leaves nothing
        to train.
        """
        own = self._is_own_last(filename)
        if own:
            filename = self._newest_whole(os.path.dirname(filename))
        elif not os.path.exists(filename) and self.is_fsdp:
            filename = re.sub(r"-shard\d+\.pt$", ".pt", filename)  # --restore-file of a whole one
        exists = self._from_all(lambda: PathManager.isfile(filename), everywhere=bool(self.checkpoint_suffix))
        if not all(exists) and not own and self.cfg.checkpoint.restore_file != "checkpoint_last.pt":
            raise CheckpointError(f"--restore-file {filename} does not exist")
        about = self._from_first(lambda: _about(filename)) if all(exists) else {}
        if isinstance(self.task, LanguageModelingTask):
            symbols, whose = self.task.source_dictionary.symbols, f"the dictionary of {self.task.args.data}"
            check_symbols(symbols, about.get("dictionary"), whose, filename)
        _check_momentum(self.cfg.model, about.get("momentum", {}), filename)
        extra_state = super().load_checkpoint(filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs)
        if extra_state is None:
            return None
        extra_state["train_iterator"]["options"] = about.get("options")
        if not (reset_optimizer or reset_lr_scheduler):
            self.skipped.update(extra_state.get("skipped", {}))
        if not reset_optimizer:
            if not self.cfg.checkpoint.reset_meters:  # as fairseq does with its record of the best loss
                vars(_early_stop()).update(_counts(extra_state.get("early_stop")))
            self._end_if_over(filename, own, extra_state)
        return extra_state

    def _is_own_last(self, filename: str) -> bool:
        folder, name = os.path.split(filename)
        return name == f"checkpoint_last{self.checkpoint_suffix}.pt" and os.path.realpath(folder) == os.path.realpath(
            self.cfg.checkpoint.save_dir
        )

    def _end_if_over(self, filename: str, own: bool, extra_state: dict[str, Any]) -> None:
        """fairseq's loop would make an update before it looks whether there are any left."""
        options, updates, hours = self.cfg.optimization, self.get_num_updates(), self._previous_training_time / 3600
        patience, bad = self.cfg.checkpoint.patience, vars(_early_stop()).get("num_runs", 0)
        # with --reset-dataloader fairseq begins with the first epoch again
        epoch = 1 if self.cfg.checkpoint.reset_dataloader else extra_state["train_iterator"]["epoch"]
        if 0 < options.max_update <= updates:
            why = f"{updates} updates, and --max-update {options.max_update}"
        elif 0 < options.stop_time_hours < hours:
            why = f"{hours:.2f} hours of training, and --stop-time-hours {options.stop_time_hours:g}"
        elif 0 < patience <= bad:
            why = f"{bad} validations without improvement, and --patience {patience}"
        elif 0 < options.max_epoch < epoch:
            why = f"all of its epochs, and --max-epoch {options.max_epoch}"
        else:
            return
        if not own:
            remedy = "raise that, or give --reset-optimizer"
            raise UserError(f"--restore-file {filename} has {why}: nothing is left to train; {remedy}")
        logger.info(f"training was finished before: {filename} has {why}; it is left as it is")
        if extra_state.get("val_loss") is None and not self.cfg.dataset.disable_validation:
            logger.warning("it was saved without a validation: fairseq-validate makes up for that")
        options.max_epoch = -1  # less than any epoch

    def get_train_iterator(self, epoch: int, *args: Any, **kwargs: Any) -> Any:
        iterator = super().get_train_iterator(epoch, *args, **kwargs)
        frequencies = self.cfg.optimization.update_freq
        iterator.update_freq = frequencies[min(epoch, len(frequencies)) - 1]
        return iterator

    def _newest_whole(self, folder: str) -> str:
        """Of the checkpoints in ``folder`` the newest that every process can read; if there is none at all, the last
        one's path.
        """
        divided = self.is_fsdp and self.cfg.distributed_training.use_sharded_state
        names = self._from_first(lambda: saved_checkpoints(folder))
        suffixes = {suffix for _, suffix in names}
        if divided and "-shard0" in suffixes:
            wanted = "-shard0"
        elif "" in suffixes or not names:
            wanted = ""  # whole ones will do for a divided run too
        else:
            raise UserError(
                f"{folder} holds checkpoints in parts (--use-sharded-state) and this run takes whole ones: "
                f"momentum-lm convert {folder}/checkpoint_last-shard0.pt {folder}/checkpoint_last.pt"
            )
        kept = [name for name, suffix in names if suffix == wanted]
        torn: list[str] = []
        for name in self._last_and_then_others(folder, kept, wanted):
            path = os.path.join(folder, name + (wanted and f"-shard{self.data_parallel_rank}") + ".pt")
            updates = self._from_all(functools.partial(self._updates_in, path), everywhere=bool(wanted))
            if updates[0] is not None and len(set(updates)) == 1:
                if torn or name != "checkpoint_last":
                    logger.warning(
                        f"{', '.join(torn) or 'checkpoint_last'} in {folder} is torn or missing: going on from {path}"
                    )
                return path
            torn.append(name)
        if torn:
            raise CheckpointError(
                f"no checkpoint in {folder} is whole ({', '.join(torn)}); move them away to start anew"
            )
        return os.path.join(folder, f"checkpoint_last{self.checkpoint_suffix}.pt")

    def _last_and_then_others(self, folder: str, names: list[str], suffix: str) -> Iterator[str]:
        """The last one; where that does not do, the others by their number of updates, which takes a look into some of
        them.
        """
        if "checkpoint_last" in names:
            yield "checkpoint_last"
        else:  # then the run's best may be one that was put here to be evaluated
            names = [name for name in names if "best" not in name]
        yield from self._from_first(
            lambda: by_updates(folder, [name for name in names if name != "checkpoint_last"], suffix)
        )

    def _updates_in(self, path: str) -> int | None:
        """After how many updates the checkpoint was saved; None if it is torn or missing."""
        try:
            state = load_checkpoint(path, mmap=True)
        except TornCheckpoint:
            return None
        world = (state.get("fsdp_metadata") or {}).get("world_size", 0)
        if "-shard" in path and world != self.data_parallel_world_size:
            raise UserError(
                f"{path} is of {world} parts, and this run has {self.data_parallel_world_size} processes: join them "
                "with "
                f"momentum-lm convert {path} OUT.pt, and give --restore-file OUT.pt"
            )
        return _updates_of(state)

    def _from_first(self, ask: Callable[[], Any]) -> Any:
        """What the first process answers, on all of them."""
        return self._from_all(ask, everywhere=False)[0]

    def _from_all(self, ask: Callable[[], Any], everywhere: bool = True) -> list[Any]:
        """Every process's answer, or the first one's alone. An error of one of them is raised on all."""
        mine: Any = None
        if everywhere or self.data_parallel_rank == 0:
            try:
                mine = ask()
            except Exception as error:  # the others wait for an answer
                mine = error
        if self.data_parallel_world_size == 1:
            answers = [mine]
        else:
            answers = [None] * self.data_parallel_world_size
            dist.all_gather_object(answers, mine, group=self.data_parallel_process_group)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers if everywhere else answers[:1]


def saved_checkpoints(folder: str) -> list[tuple[str, str]]:
    """(name, "" or "-shard0") of the checkpoints to go on from in ``folder``."""
    form = r"(checkpoint_last|checkpoint_\d+_\d+|checkpoint\d+|checkpoint_best|checkpoint\.best_.+?)(|-shard0)\.pt"
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [(match[1], match[2]) for name in names if (match := re.fullmatch(form, name))]


def by_updates(folder: str, names: list[str], suffix: str = "") -> list[str]:
    """``names`` of checkpoints in ``folder``, of the most updates first: by the name where it tells
    (checkpoint_EPOCH_UPDATES), or else by the content. Files' times say nothing: clocks are set back, copies made. Torn
    ones are first.
    """

    def updates(name: str) -> float:
        if match := re.fullmatch(r"checkpoint_\d+_(\d+)", name):
            return int(match[1])
        try:
            found = _updates_of(load_checkpoint(os.path.join(folder, f"{name}{suffix}.pt"), mmap=True))
        except CheckpointError:
            found = None
        return math.inf if found is None else found

    return sorted(names, key=updates, reverse=True)


def _updates_of(state: dict[str, Any]) -> int | None:
    """After how many updates a checkpoint was saved; None where it does not say."""
    try:
        return int(state["optimizer_history"][-1].get("num_updates", 0))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return None


def _check_momentum(model: Any, saved: Mapping[str, Any], filename: str) -> None:
    """Momentum of a fixed decay has no tensors, so that a checkpoint with it fits a model without, or of another decay.

    Raises UserError where ``saved``, options of the checkpoint, say another momentum than the model's.
    """
    for name, value in saved.items():
        here = getattr(model, name, "none" if name == "momentum_kind" else value)
        if str(getattr(here, "value", here)) != str(value):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{filename} was trained with {flag} {value}, and this command's model has {here}: give {flag} "
                f"{value}, or begin with weights of a model like this one"
            )


def _about(path: str) -> dict[str, Any]:
    """What a checkpoint says of its dictionary, its momentum, and of the options that its batches were made with: ours
    say it better themselves.
    """
    state = load_checkpoint(path, mmap=True)
    task_state, found = state.get("task_state"), {}
    if isinstance(task_state, Mapping):
        found["dictionary"] = task_state.get(DIGEST)
    try:
        cfg = state["cfg"]
        found["momentum"] = _fixed_momentum(cfg["model"])
        data, size = cfg["dataset"], int(cfg["task"]["tokens_per_sample"])
        rows, tokens = (None if data[name] is None else int(data[name]) for name in ("batch_size", "max_tokens"))
        multiple, processes = (
            int(data["required_batch_size_multiple"]),
            int(cfg["distributed_training"]["distributed_world_size"]),
        )
        known = min(size, multiple, processes, 1 if rows is None else rows) > 0 and (tokens is None or tokens >= size)
        if known and not data["update_ordered_indices_seed"]:
            names = {
                "block_size": size,
                "max_rows": rows,
                "max_tokens": tokens,
                "multiple": multiple,
                "processes": processes,
            }
            found["options"] = {**names, "seed": int(cfg["common"]["seed"])}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # an older form
    return found


def _fixed_momentum(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model's momentum, if no tensor of the model tells of it, or those may be another kind's."""
    kind = options.get("momentum_kind", "none")
    kind = getattr(kind, "value", kind)
    if kind in BUILT_IN_FILTERS and (kind != "ema" or options.get("momentum_learned")):
        return {}
    names = ["momentum_eta", "momentum_normalize"]
    if kind not in BUILT_IN_FILTERS:
        names += ["momentum_learned", "momentum_taps", "momentum_current"]
    told = {name: options[name] for name in names if options.get(name) is not None}
    return {"momentum_kind": kind, "momentum_at": options.get("momentum_at", "output"), **told}


def _early_stop() -> Any:
    """fairseq's function that counts validations without improvement, in its own attributes."""
    return getattr(sys.modules.get("fairseq_cli.train"), "should_stop_early", lambda: None)


def _counts(state: Any) -> dict[str, float]:
    """What that function remembers: the best loss, and validations since."""
    known = state if isinstance(state, Mapping) else {}
    return {key: known[key] for key in ("best", "num_runs") if isinstance(known.get(key), (int, float))}


def _prepare_optimizer(cfg: Any, model: Any) -> None:
    """What an optimizer of ours must do before it is built. Raises UserError for what does not go with it."""
    prepare = getattr(OPTIMIZER_REGISTRY.get(getattr(cfg.optimizer, "_name", None)), "prepare", None)
    if prepare is not None:
        prepare(cfg, model)


def _is_ours(cfg: Any, task: Any, model: Any) -> bool:
    from momentum_lm.fairseq_plugin.models import MomentumLanguageModel
    from momentum_lm.fairseq_plugin.tasks.token_data import TokenDataTask

    sharded = cfg.distributed_training.ddp_backend == "fully_sharded"  # fairseq's own takes fairscale
    return isinstance(task, TokenDataTask) or isinstance(model, MomentumLanguageModel) or sharded


def _check_sharded_options(cfg: Any) -> None:
    """Raises UserError for options that fully sharded training does not have here."""
    common, options = cfg.common, cfg.distributed_training
    unsupported = {
        "--fp16": common.fp16,
        "--bf16": common.bf16,
        "--amp": common.amp,
        "--cpu-offload": options.cpu_offload,
        "--zero-sharding": options.zero_sharding != "none",
        "--store-ema": cfg.ema.store_ema,
        "--use-bmuf": cfg.optimization.use_bmuf,
        # with nothing to write the first process would not gather
        "--no-last-checkpoints": cfg.checkpoint.no_last_checkpoints,
    }
    for flag, given in unsupported.items():
        if given:
            raise UserError(
                f"{flag} does not go with --ddp-backend fully_sharded; "
                "leave it out (half precision: --task momentum_language_modeling --autocast bf16)"
            )

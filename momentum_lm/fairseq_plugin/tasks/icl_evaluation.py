"""In-context classification by a model in training: prompts and scores are those of ``fairseq-eval --task
icl_classification``.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils

from momentum_lm.errors import UserError, flags, named
from momentum_lm.icl import engine
from momentum_lm.icl.datasets.loading import Example, by_name, load_dataset
from momentum_lm.icl.prompts import Prompts
from momentum_lm.lm.anatomy import is_ours
from momentum_lm.lm.cpu_fast import limit_onednn_caches
from momentum_lm.lm.native import NativeLM
from momentum_lm.model.sizes import OURS
from momentum_lm.studies.classification import Questions, Settings, units
from momentum_lm.studies.flags import integers, shortener
from momentum_lm.text.dictionary import BOS, EOS
from momentum_lm.text.tokenizer import has_tokenizer

_log = logging.getLogger(__name__)
_names = flags(
    shots="--icl-eval-shots", seed="--icl-eval-seeds", sampling="--icl-eval-sampling", limit="--icl-eval-limit",
    data_dir="--icl-eval-data-dir", shorten="--icl-eval-max-field-tokens",
)  # fmt: skip


@dataclass
class _Part:
    """What gives one number: a data set with a number of shots, once for each seed."""

    name: str
    draws: list[tuple[Prompts, list[Example]]] = field(default_factory=list)


class IclEvaluation:
    """Evaluates ``model`` on ``--icl-eval-datasets`` at every ``--icl-eval-interval`` updates.

    Everything is read and every prompt made at once, so that an impossible prompt is an error when training begins:
    UserError for flags that cannot be, unknown or missing data, DATA without a tokenizer, and prompts that do not fit
    the model.
    """

    def __init__(self, model: Any, args: Any) -> None:
        for flag in ("interval", "limit", "max_field_tokens"):
            value = args[f"icl_eval_{flag}"]
            if value is not None and value < 1:
                raise UserError(f"--icl-eval-{flag.replace('_', '-')} {value}: must be at least 1")
        if not is_ours(getattr(model, "decoder", None)):
            raise UserError(f"--icl-eval-datasets works with --arch {OURS}; leave it out, or choose one of these")
        if args.ddp_backend == "fully_sharded":
            raise UserError(
                "--icl-eval-datasets needs the whole model in each process: use another --ddp-backend than "
                "fully_sharded"
            )
        folder = utils.split_paths(args.data)[0]
        if not has_tokenizer(folder):
            raise UserError(
                f"{folder} holds no tokenizer, which --icl-eval-datasets needs: copy there what the data was made with "
                "(sentencepiece.model, or encoder.json and vocab.bpe), or make the data with `momentum-lm prepare`"
            )
        settings = Settings(
            shots=tuple(integers(args.icl_eval_shots, "--icl-eval-shots")),
            seeds=tuple(integers(args.icl_eval_seeds, "--icl-eval-seeds", 0, "1,2,3")),
            sampling=str(args.icl_eval_sampling),
            limit=args.icl_eval_limit,
        )
        self.model, self.interval, self.settings = model, args.icl_eval_interval, settings
        bos = BOS if args.add_bos_token else EOS
        limit_onednn_caches()
        self.lm = NativeLM(model.decoder, Path("the model"), bos=(bos,), tokenizer_path=folder, in_training=True)
        sizes = [args.max_tokens, args.batch_size and args.batch_size * args.tokens_per_sample]
        self.batch_tokens = min(size for size in sizes if size)  # what fits in training fits here
        try:
            with named(_names):
                self.parts = list(self._parts(args))
        except UserError as error:
            raise UserError("--icl-eval-datasets: ", error) from error

    def _parts(self, args: Any) -> Iterator[_Part]:
        form, shorten = self.settings.form(self.lm), shortener(self.lm, args.icl_eval_max_field_tokens)
        names = dict.fromkeys(args.icl_eval_datasets.split(","))
        datasets = [load_dataset(name, args.icl_eval_data_dir, shorten=shorten) for name in names]
        for data in by_name(datasets).values():
            dataset_questions = Questions(self.lm, data, self.settings)
            for note in dataset_questions.notes:
                _log.warning("%s: %s", data.spec.name, note)
            parts: dict[int, _Part] = {}
            for unit in units([dataset_questions.spec.name], self.settings):
                demonstrations, prompts = dataset_questions.prompts(form, unit)
                if len(demonstrations) < unit.shots:
                    _log.warning(
                        "%s: only %d demonstrations fit in %d tokens",
                        unit.name,
                        len(demonstrations),
                        self.lm.max_positions,
                    )
                # without those of a calibration
                prompts = replace(prompts, queries=prompts.queries[: len(dataset_questions.examples)])
                part = parts.setdefault(unit.shots, _Part(f"icl_{unit.dataset}_{unit.shots}shot"))
                part.draws.append((prompts, dataset_questions.examples))
            yield from parts.values()

    def due(self, update: int) -> bool:
        """Whether the model is to be evaluated after this update."""
        return update % self.interval == 0

    def __call__(self) -> dict[str, float]:
        """The accuracy of each data set and number of shots, and as ``..._n`` the number of queries. The same in every
        process.

        The processes share the batches, which are the same for any number of processes. The model is left as it was; no
        random number is drawn. A model whose probabilities are NaN gets NaN.
        """
        world = distributed_utils.get_data_parallel_world_size()
        rank = distributed_utils.get_data_parallel_rank() if world > 1 else 0
        counts = torch.zeros(2, len(self.parts), dtype=torch.float64)
        turn = 0
        with _evaluating(self.model):
            for column, part in enumerate(self.parts):
                for prompts, examples in part.draws:
                    batches = engine.plan(prompts.queries, self.batch_tokens)
                    mine = [number for number in range(len(batches)) if (turn + number) % world == rank]
                    turn += len(batches)
                    counts[0, column] += self._right(prompts, examples, batches, mine)
                    counts[1, column] += sum(len(batches[number].queries) for number in mine)
        if world > 1:
            on_device = counts.to(self.lm.device)
            counts = distributed_utils.all_reduce(on_device, distributed_utils.get_data_parallel_group()).cpu()
        values: dict[str, float] = {}
        for part, right, dataset_questions in zip(self.parts, *counts.tolist(), strict=True):
            values |= {part.name: right / dataset_questions, f"{part.name}_n": int(dataset_questions)}
        return values

    def _right(self, prompts: Prompts, examples: list[Example], batches: list[engine.Batch], mine: list[int]) -> float:
        right = 0
        try:
            for _, answers in engine.score_batches(self.lm, prompts.queries, batches, numbers=mine):
                for query, found in answers.items():
                    right += engine.best(prompts.queries[query], found) == examples[query].gold
        except UserError as error:
            _log.warning("%s", error)
            return math.nan
        return right


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, without the compiled graphs, which are for batches of training's shape; then back, module by
    module.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True

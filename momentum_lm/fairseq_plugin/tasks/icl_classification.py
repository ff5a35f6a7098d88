"""``fairseq-validate DATA --task icl_classification --criterion icl_classification --path CKPT --datasets mr --shots 4
--batch-size 8``: the accuracy of ``fairseq-eval --task icl_classification``, from fairseq's own loop, model interface
and batches.

DATA is the folder of the model's dict.txt and tokenizer. Every prompt goes through the model as a whole, so this is
slower than ``fairseq-eval`` with its shared beginnings, works with any of fairseq's decoder-only models, and checks it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.tasks import FairseqTask, register_task
from torch import Tensor

from momentum_lm.errors import UserError
from momentum_lm.fairseq_plugin.training import load_task_state
from momentum_lm.icl.datasets.loading import by_name
from momentum_lm.icl.engine import Query, extent
from momentum_lm.lm.scoring import distinct_positions, target_log_probs
from momentum_lm.studies.flags import add_question_arguments, load_datasets, settings_from
from momentum_lm.text.dictionary import BOS, EOS
from momentum_lm.text.tokenizer import Tokenizer, load_tokenizer

NAME = "icl_classification"
PREFIX = "icl_"  # of our flags' names in fairseq's one namespace for all, where `sampling` is beam search's


@dataclass
class FairseqLM:
    """Any decoder-only model of fairseq as far as prompts and their scores need it (see
    :mod:`momentum_lm.lm.protocol`).
    """

    name: str
    tokenizer: Tokenizer
    bos: tuple[int, ...]
    pad: int
    model: Any = None
    max_positions: int = 0
    separator: tuple[int, ...] = (EOS,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def log_probs(
        self, tokens: Tensor, padding: Tensor, rows: Tensor, positions: Tensor, targets: Tensor, state: None = None
    ) -> tuple[Tensor, Tensor]:
        """As of every language model; there is no state. Raises UserError for a model with an adaptive softmax."""
        decoder = self.model.decoder
        if decoder.adaptive_softmax is not None:
            raise UserError(
                "the model has an adaptive softmax, for which label scores are not implemented; use another model"
            )
        device = next(self.model.parameters()).device
        inputs, lengths = tokens.masked_fill(padding, self.pad).to(device), (~padding).sum(1).to(device)
        features = self.model(src_tokens=inputs, src_lengths=lengths, features_only=True)[0]
        pairs, which = distinct_positions(rows, positions)
        row, position = pairs.to(device)

        def logits_of(part: slice) -> Tensor:
            return decoder.output_layer(features[row[part], position[part]])

        return target_log_probs(logits_of, which, targets, self.tokenizer.vocab_size, self.pad)


@register_task(NAME)
class IclClassificationTask(FairseqTask):
    """Evaluates a checkpoint of any decoder-only model, whatever task it was trained with."""

    for_any_checkpoint = True  # fairseq_compat lets this task replace the checkpoint's in fairseq-validate

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        others = set(parser._actions)
        if any("--arch" in action.option_strings for action in others):
            raise UserError(
                f"--task {NAME} evaluates a checkpoint, with fairseq-validate; to see the accuracy in training, "
                "use --task momentum_language_modeling --icl-eval-datasets"
            )
        parser.add_argument("data", help="folder of the model's dict.txt and tokenizer")
        others = set(parser._actions)
        add_question_arguments(parser)
        parser.add_argument("--score", default="mean", choices=["mean", "sum"], help="of a label's log-probabilities")
        parser.set_defaults(shots="0")
        for action in set(parser._actions) - others:
            action.dest = PREFIX + action.dest
            if action.default is argparse.SUPPRESS:  # fairseq would leave out a flag that is not given
                action.default = None

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> IclClassificationTask:
        """Raises UserError for flags that cannot be, and a folder without dictionary or tokenizer."""
        return cls(args)

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        given = {name.removeprefix(PREFIX): value for name, value in vars(args).items() if name.startswith(PREFIX)}
        self.flags = argparse.Namespace(**given, path=args.path, batch_tokens=None, padding_side="right")
        self.settings = replace(settings_from(self.flags), score=self.flags.score)
        if len(set(self.settings.shots)) > 1:
            raise UserError(
                f"--shots {self.flags.shots}: fairseq-validate gives one number; name one, or use fairseq-eval"
            )
        tokenizer = load_tokenizer(args.data)
        self.dictionary = Dictionary.load(f"{args.data}/dict.txt")
        bos = BOS if getattr(args, "add_bos_token", False) else EOS  # as the checkpoint was trained
        self.lm: Any = FairseqLM(args.path, tokenizer, (bos,), self.dictionary.pad())

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        self.lm.model = super().build_model(cfg, from_checkpoint)
        self.lm.max_positions = int(self.lm.model.max_positions())
        return self.lm.model

    def build_criterion(self, cfg: Any) -> Any:
        if cfg._name != NAME:
            raise UserError(f"--task {NAME} needs --criterion {NAME}")
        return super().build_criterion(cfg)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """``valid`` is the data set of --datasets; of several, --valid-subset names those to evaluate.

        Raises UserError for data that cannot be found and prompts that cannot be made.
        """
        from momentum_lm.studies.classification import Questions, units

        loaded = by_name(load_datasets(self.flags, self.lm))
        name = next(iter(loaded)) if split == "valid" and len(loaded) == 1 else split
        if name not in loaded:
            raise UserError(
                f"--valid-subset {split}: name those of --datasets that are to be evaluated ({','.join(loaded)})"
            )
        questions, form = Questions(self.lm, loaded[name], self.settings), self.settings.form(self.lm)
        items: list[tuple[Query, int]] = []
        for unit in units([name], self.settings):
            queries = questions.prompts(form, unit)[1].queries  # without those of a calibration
            items += zip(queries, (example.gold for example in questions.examples), strict=False)
        self.datasets[split] = QueryDataset(items)

    def max_positions(self) -> int:
        return self.lm.max_positions

    load_state_dict = load_task_state

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary


class QueryDataset(FairseqDataset):
    """One item is a query with the number of its right choice. Its size is that of its longest row."""

    def __init__(self, items: Sequence[tuple[Query, int]]) -> None:
        super().__init__()
        self.items = items
        self.counts, self.sizes = np.array([extent(query) for query, _ in items]).T

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Query, int]:
        return self.items[index]

    def size(self, index: int) -> int:
        """Tokens of its longest row: what must fit the model."""
        return int(self.sizes[index])

    def num_tokens(self, index: int) -> int:
        """Tokens of all its rows, padded: what counts for --max-tokens."""
        return int(self.sizes[index] * self.counts[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.sizes[indices] * self.counts[indices]

    def ordered_indices(self) -> np.ndarray:
        return np.argsort(self.sizes, kind="stable")

    def collater(self, samples: Sequence[tuple[Query, int]]) -> dict[str, Any]:
        """The queries and their right choices. Without samples, as when processes get unequal shares, only nsentences,
        which is 0.
        """
        if not samples:
            return {"nsentences": 0}
        queries, gold = zip(*samples, strict=True)
        tokens = sum(rows * longest for rows, longest in map(extent, queries))
        return {"queries": queries, "gold": gold, "nsentences": len(samples), "ntokens": tokens}

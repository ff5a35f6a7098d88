"""``fairseq-validate DATA --task icl_classification --criterion icl_classification --path CKPT --datasets mr --shots 4 --batch-size 8``:
the accuracy of ``fairseq-eval --task icl_classification``, found by fairseq's own loop and model interface.

DATA is the folder of the model's dict.txt and tokenizer. Every prompt goes through the model as a whole, so this is slower than
``fairseq-eval`` with its shared prefixes, works with any of fairseq's decoder-only models, and checks it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.data.data_utils import collate_tokens
from fairseq.tasks import FairseqTask, register_task

from momentum_lm.errors import UserError
from momentum_lm.fairseq_plugin.training import load_task_state
from momentum_lm.icl.datasets.loading import by_name
from momentum_lm.studies.flags import add_question_arguments, load_datasets, settings_from
from momentum_lm.text.dictionary import BOS, EOS
from momentum_lm.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from momentum_lm.icl.prompts import Prompts

NAME = "icl_classification"
PREFIX = "icl_"  # of our flags' names in fairseq's one namespace for all, where `sampling` is beam search's


@dataclass
class Asker:
    """What prompts need to know of a model (part of :class:`momentum_lm.lm.protocol.LanguageModel`)."""

    name: str
    tokenizer: Tokenizer
    bos: tuple[int, ...]
    max_positions: int
    separator: tuple[int, ...] = (EOS,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


@register_task(NAME)
class IclClassificationTask(FairseqTask):
    """Evaluates a checkpoint of any decoder-only model, whatever task it was trained with."""

    for_any_checkpoint = True  # fairseq_compat gives it its way with fairseq-validate

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
            raise UserError(f"--shots {self.flags.shots}: fairseq-validate gives one number; name one, or use fairseq-eval")
        self.tokenizer = load_tokenizer(args.data)
        self.dictionary = Dictionary.load(f"{args.data}/dict.txt")
        self.bos = (BOS if getattr(args, "add_bos_token", False) else EOS,)  # as the checkpoint was trained
        self.max_length = 0

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        model = super().build_model(cfg, from_checkpoint)
        self.max_length = int(model.max_positions())
        return model

    def build_criterion(self, cfg: Any) -> Any:
        if cfg._name != NAME:
            raise UserError(f"--task {NAME} needs --criterion {NAME}")
        return super().build_criterion(cfg)

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """``valid`` is the data set of --datasets; of several, --valid-subset names those to evaluate.

        Raises UserError for what cannot be found or asked.
        """
        from momentum_lm.studies.classification import Questions, units

        asker: Any = Asker(self.flags.path, self.tokenizer, self.bos, self.max_length)
        loaded = by_name(load_datasets(self.flags, asker))
        name = next(iter(loaded)) if split == "valid" and len(loaded) == 1 else split
        if name not in loaded:
            raise UserError(f"--valid-subset {split}: name those of --datasets that are to be evaluated ({','.join(loaded)})")
        dataset_questions, form = Questions(asker, loaded[name], self.settings), self.settings.form(asker)
        items: list[Item] = []
        for unit in units([name], self.settings):
            prompts = dataset_questions.prompts(form, unit)[1]
            items += (Item(prompts, i, example.gold) for i, example in enumerate(dataset_questions.examples))
        self.datasets[split] = PromptDataset(items, self.settings.score, self.dictionary.pad())

    def max_positions(self) -> int:
        return self.max_length

    load_state_dict = load_task_state

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary


@dataclass(frozen=True)
class Item:
    """One query after its demonstrations."""

    prompts: Prompts
    query: int
    gold: int

    def rows(self) -> tuple[list[list[int]], list[tuple[int, int, int, int]]]:
        """Rows of token ids, and what is read off them: (choice, row, position, target). Labels of one token share a row."""
        found: dict[tuple[int, ...], int] = {}
        wanted = []
        for choice, request in enumerate(self.prompts.queries[self.query]):
            tokens = [*self.prompts.prefix, *request.tokens]
            row = found.setdefault(tuple(tokens[:-1]), len(found))
            start = len(self.prompts.prefix) + request.start
            wanted += [(choice, row, position - 1, tokens[position]) for position in range(start, len(tokens))]
        return [list(row) for row in found], wanted


class PromptDataset(FairseqDataset):
    """One item is one query with all its rows. ``score``: ``mean`` or ``sum`` over a continuation's tokens."""

    def __init__(self, items: Sequence[Item], score: str, pad: int) -> None:
        super().__init__()
        self.items, self.score, self.pad = items, score, pad
        self.counts, self.sizes = np.array([self._shape(item) for item in items]).T

    def _shape(self, item: Item) -> tuple[int, int]:
        rows, _ = item.rows()
        return len(rows), max(map(len, rows))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
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

    def collater(self, samples: Sequence[Item]) -> dict[str, Any]:
        """``targets[n]`` is asked of row ``rows[n]`` at ``positions[n]``, and counts ``weights[n]`` for choice ``choices[n]`` of query
        ``queries[n]``; ``gold`` (B,). Without samples, as when processes get unequal shares, only nsentences, which is 0."""
        if not samples:
            return {"nsentences": 0}
        rows: list[list[int]] = []
        wanted: list[tuple[int, int, int, int, int]] = []
        for query, item in enumerate(samples):
            mine, targets_of_item = item.rows()
            wanted += [(query, choice, len(rows) + row, *place) for choice, row, *place in targets_of_item]
            rows += mine
        queries, choices, at, positions, targets = torch.tensor(wanted).unbind(1)
        lengths = torch.tensor([len(row) for row in rows])
        return {
            "net_input": {
                "src_tokens": collate_tokens([torch.tensor(row) for row in rows], self.pad),
                "src_lengths": lengths,
            },
            "queries": queries,
            "choices": choices,
            "rows": at,
            "positions": positions,
            "targets": targets,
            "weights": torch.tensor(list(self._weights(samples)), dtype=torch.float64),
            "gold": torch.tensor([item.gold for item in samples]),
            "nsentences": len(samples),
            "ntokens": int(lengths.sum()),
        }

    def _weights(self, samples: Sequence[Item]) -> Iterator[float]:
        for item in samples:
            for request in item.prompts.queries[item.query]:
                count = len(request.tokens) - request.start
                yield from [1 / count if self.score == "mean" else 1.0] * count

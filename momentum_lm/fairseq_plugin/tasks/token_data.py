"""What fairseq's trainer draws its batches from: ``momentum_lm.text.blocks`` as fairseq's datasets, iterator and task.

Blocks of a fixed length (``--sample-break-mode none``, the default) are cut and batched by us, and are the same as
fairseq's. Other break modes, shortened documents and other targets than the next token are left to fairseq's classes,
over documents that are read by us.
"""

import inspect
import logging
import os
import pickle
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.data import FairseqDataset, MonolingualDataset, TokenBlockDataset
from fairseq.data.indexed_dataset import infer_dataset_impl
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.shorten_dataset import maybe_shorten_dataset
from fairseq.tasks.language_modeling import LanguageModelingTask
from numpy.typing import NDArray

from momentum_lm.errors import UserError
from momentum_lm.text.blocks import BlockBatches, Documents, Part, ShardedBatches, TokenBlocks, remaining
from momentum_lm.text.indexed import IndexedDataset, check_files, token_dtype

logger = logging.getLogger(__name__)


class DocumentDataset(FairseqDataset):
    """Documents as tensors, for fairseq to cut."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.sizes = documents.sizes

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.from_numpy(self.documents[int(item)])


class BlockDataset(FairseqDataset):
    """Blocks as fairseq's MonolingualDataset takes them: source, next tokens, and none of the tokens before."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks
        self.sizes = np.full(len(blocks), blocks.block_size, np.uint16 if blocks.block_size < 65535 else np.uint32)
        self.sizes[-1] = blocks.last_size

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, block: int) -> tuple[torch.Tensor, torch.Tensor, None]:
        inputs, targets = self.blocks[int(block)]
        return torch.from_numpy(inputs), torch.from_numpy(targets), None


class TokenDataset(MonolingualDataset):
    """fairseq's, with batches whose samples are read from the disk together, and that ``--num-workers`` hand over as
    bytes.
    """

    def __getitems__(self, samples: list[int]) -> list[Any]:
        """A batch, as torch's DataLoader asks for it."""
        if isinstance(self.dataset, BlockDataset):
            self.dataset.blocks.read_ahead(samples)
        return [self[sample] for sample in samples]

    def collater(self, samples: list[Any]) -> dict[str, Any]:
        return _Batch(super().collater(samples))


class _Batch(dict):
    """A batch that goes to another process as one tensor of bytes. torch would send each of its tensors in shared
    memory of its own, as int64, which takes the training process longer than to make the batch itself. (Bytes by
    themselves would go through a pipe, on which their sender waits for ever when the training process is killed.)
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (
            torch.frombuffer(bytearray(pickle.dumps(utils.apply_to_sample(_Ids, dict(self)))), dtype=torch.uint8),
        )

    def __copy__(self) -> dict[str, Any]:
        return dict(self)  # torch copies a batch to pin its memory


def _unpacked(packed: torch.Tensor) -> dict[str, Any]:
    batch: dict[str, Any] = pickle.loads(packed.numpy().data)
    return batch


class _Ids:
    """Token ids, pickled in the smallest type."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _tensor, (self.array.astype(token_dtype(int(self.array.max(initial=0)) + 1)),)


def _tensor(ids: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64))


_ANEW = "begin the epoch anew with --reset-dataloader"


@dataclass(frozen=True)
class _Position:
    """Where a resumed epoch goes on: the seed that it began with, its parts before the present one, and the batches of
    all parts.
    """

    epoch: int
    seed: int
    parts: tuple[Part, ...]
    batches: int


class BlockIterator(EpochBatchIterator):
    """fairseq's iterator over ``BlockBatches``. To set it to any batch of an epoch takes as long as to shuffle the
    epoch's batches.

    Its state says which blocks all processes together have had, so that a run with batches of another size, another
    number of processes or another ``--update-freq`` goes on with those that are left. ``update_freq``: an epoch goes on
    after a multiple of so many iterations, as fairseq's grouping of iterations takes for granted.
    """

    update_freq = 1

    def __init__(self, dataset: Any, batches: BlockBatches, **kwargs: Any) -> None:
        super().__init__(dataset, dataset.collater, (), **kwargs)
        self._frozen_batches = batches
        self._blocks = batches.blocks
        self._go_on_with(_Position(0, self.seed, (), 0))

    def _go_on_with(self, position: _Position) -> None:
        self._position = position
        self._missing = 0  # in the epoch, so many batches short of what as many iterations of all processes have
        # what is left of the epoch, where it is cut in another way than it began
        self._rest: BlockBatches | None = None

    def ordered_batches(self, epoch: int, fix_batches_to_gpus: bool, shuffle: bool) -> ShardedBatches:
        """What this process gets in ``epoch``."""
        before = self._missing if epoch == self._position.epoch else 0
        if self._rest is not None and epoch == self._position.epoch:
            return self._rest.of_process(self.num_shards, self.shard_id, None, before + self._position.batches)
        return self._frozen_batches.of_process(
            self.num_shards, self.shard_id, self.seed + epoch if shuffle else None, before
        )

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        going_on = state["epoch"] == self._position.epoch
        seed, missing = self.seed, 0
        parts: tuple[tuple[int, int, int], ...] = ()
        if going_on:
            seed, parts, missing = self._position.seed, self._position.parts, self._missing
        batches = max(0, state["iterations_in_epoch"] * self.num_shards - missing)
        parts = (*parts, (*self._frozen_batches.cut, batches - sum(had for _, _, had in parts)))
        blocks = {"blocks": len(self._blocks), "block_size": self._blocks.block_size}
        return {
            **state,
            "batches_in_epoch": batches,
            "batching": {**blocks, "seed": seed, "parts": [list(part) for part in parts]},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """``options``: those of the run that saved the state, for states that do not say themselves which batches it
        had.

        Raises UserError for the middle of an epoch of other blocks.
        """
        options = state_dict.get("options") or {}
        processes = options.get("processes", self.num_shards)
        batches = state_dict.get("batches_in_epoch", state_dict.get("iterations_in_epoch", 0) * processes)
        mine, seed = self._frozen_batches.cut, self.seed
        parts: tuple[Part, ...] = ((*mine, batches),)
        if batches and "batching" in state_dict:
            seed, parts = self._read(state_dict["batching"])
        elif batches and options:
            seed, parts = options["seed"], ((*self._cut_by(options), batches),)
        cut_anew = len(parts) > 1 or parts[0][:2] != mine or seed != self.seed
        before = parts[:-1] if parts[-1][:2] == mine and (len(parts) > 1 or not cut_anew) else parts
        self._go_on_with(_Position(state_dict["epoch"], seed, tuple(part for part in before if part[2]), batches))
        step = self.num_shards * self.update_freq
        iterations = -(-batches // step) * self.update_freq
        self._missing = iterations * self.num_shards - batches
        if batches and cut_anew:
            shuffle = seed + state_dict["epoch"] if state_dict.get("shuffle", True) else None
            self._rest = self._frozen_batches.of(remaining(self._blocks, seed, shuffle, parts))
        super().load_state_dict({**state_dict, "iterations_in_epoch": iterations})

    def _read(self, batching: Any) -> tuple[int, tuple[Part, ...]]:
        try:
            seed, count, size = (int(batching[name]) for name in ("seed", "blocks", "block_size"))
            parts = tuple((int(rows), int(multiple), int(had)) for rows, multiple, had in batching["parts"])
            if not parts or any(rows < 1 or multiple < 1 or had < 0 for rows, multiple, had in parts):
                raise ValueError
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise UserError(f"the checkpoint's place in the data is damaged; {_ANEW}") from error
        if (count, size) != (len(self._blocks), self._blocks.block_size):
            raise self._other(f"{count} samples of {size} tokens")
        return seed, parts

    def _cut_by(self, options: dict[str, Any]) -> tuple[int, int]:
        if options["block_size"] != self._blocks.block_size:
            raise self._other(f"samples of {options['block_size']} tokens")
        return BlockBatches(self._blocks, options["max_rows"], options["max_tokens"], options["multiple"], 0).cut

    def _other(self, blocks: str) -> UserError:
        return UserError(
            f"the checkpoint stopped within an epoch of {blocks}, and this one has {len(self._blocks)} of "
            f"{self._blocks.block_size}: train with the same data and --tokens-per-sample, or {_ANEW}"
        )


class PlainIterator(EpochBatchIterator):
    """fairseq's, which counts batches, and refuses to go on within an epoch of other batches."""

    update_freq = 1

    def _plan(self) -> list[int]:
        ends = [list(map(int, self.frozen_batches[i])) for i in (0, -1)] if len(self.frozen_batches) else []
        return [len(self.frozen_batches), zlib.crc32(repr(ends).encode()), self.num_shards, self.seed]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "plan": self._plan()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError for the middle of an epoch of other batches."""
        iterations = state_dict.get("iterations_in_epoch", 0)
        plan = self._plan()
        if iterations and (state_dict.get("plan", plan) != plan or iterations % self.update_freq):
            raise UserError(
                "the checkpoint stopped within an epoch of other batches, of whole documents or the like, where a "
                "place cannot be carried "
                "over: keep the data, --batch-size, --max-tokens, --update-freq, --seed and the number of processes, "
                f"or {_ANEW}"
            )
        super().load_state_dict(state_dict)


class TokenDataTask(LanguageModelingTask):
    """Language modelling of token files. In ``args``, beside fairseq's options of the task, is ``train_subset``."""

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> Any:
        """As fairseq's, but reads no token yet. Raises UserError naming the file that is missing, cut short, damaged or
        empty.
        """
        folders = utils.split_paths(self.args.data)
        prefix = os.path.join(folders[(epoch - 1) % len(folders)], split)
        if not {self.args.dataset_impl, infer_dataset_impl(prefix)} <= {None, "mmap"}:
            return super().load_dataset(split, epoch, combine, **kwargs)
        if split == self.args.train_subset:
            for folder in folders:  # now, rather than in the epoch whose turn it is
                check_files(os.path.join(folder, split))
        documents = _documents(prefix, combine, len(self.dictionary))
        args, fixed = self.args, self.args.sample_break_mode in (None, "none")
        whole = DocumentDataset(documents)
        kept = maybe_shorten_dataset(
            whole, split, args.shorten_data_split_list, args.shorten_method, args.tokens_per_sample, args.seed
        )
        if fixed and kept is whole and self.targets == ["future"]:
            cut = BlockDataset(TokenBlocks(documents, args.tokens_per_sample, self.dictionary.eos()))
        else:
            cut = TokenBlockDataset(
                kept,
                kept.sizes,
                args.tokens_per_sample,
                pad=self.dictionary.pad(),
                eos=self.dictionary.eos(),
                break_mode=args.sample_break_mode,
                include_targets=True,
                use_plasma_view=args.use_plasma_view,
                split_path=prefix,
                plasma_path=args.plasma_path,
            )
        rows = args.batch_size_valid if "valid" in split else args.batch_size
        self.datasets[split] = TokenDataset(
            cut,
            cut.sizes,
            self.dictionary,
            self.output_dictionary,
            add_eos_for_other_targets=not fixed,
            shuffle=True,
            targets=self.targets,
            add_bos_token=args.add_bos_token,
            fixed_pad_length=args.tokens_per_sample if args.pad_to_fixed_length else None,
            pad_to_bsz=rows if args.pad_to_fixed_bsz else None,
        )

    def get_batch_iterator(self, *args: Any, **kwargs: Any) -> EpochBatchIterator:
        """As fairseq's; over blocks of a fixed length, a ``BlockIterator``."""
        bound = inspect.signature(super().get_batch_iterator).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = SimpleNamespace(**bound.arguments)
        self._check_room(arguments)
        if not _ours(arguments):
            iterator = super().get_batch_iterator(*args, **kwargs)
            if type(iterator) is EpochBatchIterator and isinstance(arguments.dataset, TokenDataset):
                iterator.__class__ = PlainIterator
            return iterator
        known, cached = (
            self.dataset_to_epoch_iter,
            not (arguments.disable_iterator_cache or arguments.update_epoch_batch_itr),
        )
        if cached and arguments.dataset in known:
            return known[arguments.dataset]
        iterator = BlockIterator(
            arguments.dataset,
            BlockBatches(
                arguments.dataset.dataset.blocks,
                arguments.max_sentences,
                arguments.max_tokens,
                arguments.required_batch_size_multiple,
                arguments.seed,
            ),
            seed=arguments.seed,
            num_shards=arguments.num_shards,
            shard_id=arguments.shard_id,
            num_workers=arguments.num_workers,
            epoch=arguments.epoch,
            buffer_size=arguments.data_buffer_size,
            skip_remainder_batch=arguments.skip_remainder_batch,
            reuse_dataloader=getattr(self.cfg, "reuse_dataloader", True),
        )
        if cached:
            known[arguments.dataset] = iterator
        return iterator

    def _check_room(self, arguments: SimpleNamespace) -> None:
        """Raises UserError where no sample fits a batch, or none to train with the model: fairseq would leave out all
        of them, and say that the data is empty, or that the perplexity is 1.
        """
        if not isinstance(arguments.dataset, TokenDataset):
            return
        training = arguments.dataset is self.datasets.get(self.args.train_subset)
        cut = arguments.dataset.dataset
        least = cut.blocks.longest if isinstance(cut, BlockDataset) else int(np.min(arguments.dataset.sizes))
        if arguments.max_tokens is not None and least > arguments.max_tokens:
            flag = "--max-tokens" if training or arguments.max_tokens == self.args.max_tokens else "--max-tokens-valid"
            raise UserError(
                f"a sample of {least} tokens does not fit {flag} {arguments.max_tokens}: raise it, or lower "
                f"--tokens-per-sample {self.args.tokens_per_sample}"
            )
        limit = arguments.max_positions
        if training and isinstance(limit, (int, float)) and least > limit:
            raise UserError(
                f"a sample of {least} tokens does not fit the model, which takes {limit:g}: lower --tokens-per-sample, "
                "or for a new model raise --max-target-positions"
            )


def _documents(prefix: str, combine: bool, vocab_size: int) -> Documents:
    """Those of the files ``PREFIX`` and, to ``combine``, PREFIX1, PREFIX2 and so on, as many as there are."""
    names = [prefix]
    while combine and any(os.path.exists(f"{prefix}{len(names)}.{end}") for end in ("idx", "bin")):
        names.append(f"{prefix}{len(names)}")
    documents = Documents([IndexedDataset(name) for name in names], vocab_size)
    if documents.num_tokens == 0:
        raise UserError(f"{prefix}.bin holds no tokens; make it anew from text that is not empty")
    logger.info(
        "found %s documents, %s tokens in: %s", f"{len(documents):,}", f"{documents.num_tokens:,}", ", ".join(names)
    )
    return documents


def _ours(arguments: SimpleNamespace) -> bool:
    """Whether the batches are ours to make. To leave out samples that are too long, or to complain of them, is
    fairseq's.
    """
    if (
        not (isinstance(arguments.dataset, TokenDataset) and isinstance(arguments.dataset.dataset, BlockDataset))
        or arguments.grouped_shuffling
    ):
        return False
    limits = [limit for limit in (arguments.max_tokens, arguments.max_positions) if limit is not None]
    return all(
        isinstance(limit, (int, float)) and arguments.dataset.dataset.blocks.longest <= limit for limit in limits
    )

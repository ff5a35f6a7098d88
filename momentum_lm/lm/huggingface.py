"""Any causal language model of Hugging Face ``transformers``, by name or folder, GGUF files included."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from momentum_lm.errors import UserError, arg
from momentum_lm.files import Unchanged, file_sha256
from momentum_lm.formats.gguf import header_read_once
from momentum_lm.text.hub import hub_answers
from momentum_lm.text.tokenizer import prefix_of

from .anatomy import context_length
from .attention_interface import added_momentum
from .cpu_fast import (
    PACKED_ATTENTION,
    PackedRows,
    SharedPrefix,
    enabled,
    inference,
    limit_onednn_caches,
    packed,
    register_packed_attention,
)
from .scoring import distinct_positions, target_log_probs
from .states import KeyValueRows, TokenRows
from .tracing import being_traced
from .verification import (
    apart,
    reset_rotary,
    shortened_windows,
    switch_length,
    tolerance,
    trial_lengths,
    trial_tokens,
)

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.py")
_ENDLESS = 1 << 20  # tokenizers without a limit give one far above any model's
_log = logging.getLogger(__name__)


class HuggingFaceLM:
    """A causal model of ``transformers`` in evaluation mode. Prompts begin as its tokenizer begins a text;
    demonstrations are separated by an empty line (by ``</s>`` for XGLM, the form in which fairseq's dense LMs are
    published: they never saw line breaks).

    The model is tried on a few dozen tokens first: scores after a shared prefix must be those of whole prompts. Where
    they are not, prompts are read as a whole, with a warning. Raises UserError for a model that sees the future, or
    that gives other predictions however it is run.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, sha256: str, unchanged: Unchanged | None = None) -> None:
        self._unchanged = unchanged or Unchanged([])
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.sha256 = name, sha256
        self.config = model.config.get_text_config(decoder=True)
        self.shares_prefixes = self._may_share_prefixes()
        """Whether rows share keys and values of a prefix. Other models read each prompt as a whole."""
        self._selects_logits, self._pads_rows = True, True
        self._switch_length = switch_length(self.config)
        # others, such as sparse attention, may look at the implementation's name
        plain = self.config._attn_implementation == "sdpa" and model.device.type == "cpu"
        if plain and self.shares_prefixes and enabled():
            model.set_attn_implementation(register_packed_attention())
        parameters = inspect.signature(model.forward).parameters
        self._takes_logits_to_keep, self._takes_cache_position, self._takes_position_ids = (
            name in parameters for name in ("logits_to_keep", "cache_position", "position_ids")
        )
        self.separator: str | tuple[int, ...] = (
            (tokenizer.eos_token_id,) if self.config.model_type == "xglm" else "\n\n"
        )
        self._verify()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the output embedding."""
        weight = getattr(self.model.get_output_embeddings(), "weight", None)
        return self.config.vocab_size if weight is None else weight.shape[0]

    @cached_property
    def max_positions(self) -> int:
        """The longest input that the model was made for, in tokens."""
        limit = getattr(self.tokenizer, "model_max_length", _ENDLESS)
        return context_length(self.config, int(limit) if limit < _ENDLESS else None)

    @cached_property
    def bos(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text."""
        return tuple(prefix_of(self.tokenizer("a", add_special_tokens=False).input_ids, self.tokenizer("a").input_ids))

    def _may_share_prefixes(self) -> bool:
        """Whether keys and values are all that the model remembers, as far as its configuration tells."""
        from transformers import DynamicCache

        if getattr(self.model, "_is_stateful", False):
            return False
        layers = DynamicCache(config=self.model.config).layers
        return all(type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer") for layer in layers)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Digest of all that makes token ids of texts."""
        tokenizer, bos = self.tokenizer, self.bos
        # whose padding and truncation, which the file may bring, go with the first text: that of ``bos`` by now
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        rules = json.dumps(sorted(vocabulary.items())) if backend is None else backend.to_str()
        names = getattr(tokenizer, "vocab_files_names", {}) if backend is None else {}
        files = [path for name in names if (path := getattr(tokenizer, name, None)) and Path(path).is_file()]
        special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
        text = json.dumps([type(tokenizer).__name__, rules, special, bos, file_sha256(*files)], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def check_unchanged(self) -> None:
        """Raises UserError where the files of the weights are no longer those that were read."""
        self._unchanged.check()

    def describe(self) -> dict[str, Any]:
        """What a record says of the model."""
        architecture = {
            k: v
            for k, v in self.config.to_dict().items()
            if isinstance(v, (bool, int, float, str)) and not k.startswith("_")
        }
        if (added := added_momentum(self.model)) is not None:
            architecture |= {f"added_momentum_{name}": getattr(added, name) for name in ("eta", "normalize", "gate")}
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"path": self.name, "sha256": self.sha256, "parameters": parameters, "architecture": architecture}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens: a text that spells one, such as "</s>", is ordinary text, if
        the tokenizer can."""
        return self.tokenizer(list(texts), add_special_tokens=False, **self._as_text).input_ids if texts else []

    @cached_property
    def _as_text(self) -> dict[str, bool]:
        try:
            self.tokenizer("a", add_special_tokens=False, split_special_tokens=True)
        except (TypeError, ValueError, NotImplementedError):  # tokenizers of other libraries
            return {}
        return {"split_special_tokens": True}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their names."""
        names = [
            token.content for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values() if token.special
        ]
        names += self.tokenizer.all_special_tokens
        return dict(zip(names, self.tokenizer.convert_tokens_to_ids(names), strict=True)) if names else {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of which each ends a generated text."""
        settings = getattr(self.model, "generation_config", None)
        for holder in (settings, self.config, self.tokenizer):
            if (found := getattr(holder, "eos_token_id", None)) is not None:
                return tuple(found) if isinstance(found, (list, tuple)) else (found,)
        return ()

    def row_bytes(self, prefix: int, length: int, keeps: bool = False) -> int:
        """Keys, values and mask of one layer over the whole row, and one block's activations; ``keeps``: and keys and
        values of all layers."""
        config = self.config
        if not self.shares_prefixes:
            prefix, length = 0, prefix + length
        dim = int(getattr(config, "hidden_size", 1024))
        ffn = int(getattr(config, "intermediate_size", None) or 4 * dim)
        kept = 2 * dim * int(getattr(config, "num_hidden_layers", 24)) * (prefix + length) if keeps else 0
        return (
            self.dtype.itemsize * (kept + 4 * dim * (prefix + length) + length * (6 * dim + 3 * ffn))
            + 4 * 4 * self.vocab_size
        )

    @inference
    def start(self, ids: Sequence[int]) -> SharedPrefix | TokenRows:
        """Keys and values of the tokens; the tokens themselves where rows cannot share those."""
        from transformers import DynamicCache

        if not self.shares_prefixes:
            return TokenRows([ids])
        cache = DynamicCache()  # without the configuration it keeps every token: a window is the mask's affair
        last = {"logits_to_keep": 1} if self._takes_logits_to_keep else {}
        self.model(torch.tensor([list(ids)], device=self.device), past_key_values=cache, use_cache=True, **last)
        return SharedPrefix(cache, ids)

    @inference
    def log_probs(
        self,
        tokens: Tensor,
        padding: Tensor,
        rows: Tensor,
        positions: Tensor,
        targets: Tensor,
        state: SharedPrefix | TokenRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`momentum_lm.lm.protocol.LanguageModel.log_probs`."""
        # Padding on the left would stand between prefix and row, where a sliding window counts it: it goes to the
        # right.
        shift = padding.long().argmin(1)
        order = (torch.arange(tokens.shape[1]) + shift[:, None]) % tokens.shape[1]
        tokens, seen, positions = (
            tokens.masked_fill(padding, 0).gather(1, order),
            ~padding.gather(1, order),
            positions - shift[rows],
        )
        if not self._pads_rows or (
            self._switch_length is not None
            and tokens.shape[1] + (0 if state is None else state.length) > self._switch_length
        ):
            return self._separate_log_probs(tokens, seen, rows, positions, targets, state)
        plain = (
            self.config._attn_implementation == PACKED_ATTENTION
            and self.dtype == torch.float32
            and self.device.type == "cpu"
        )
        if plain and isinstance(state, SharedPrefix) and self._packs_rows:
            return self._packed_log_probs(tokens, seen, rows, positions, targets, state)
        return self._padded_log_probs(tokens, rows, positions, targets, state)

    def _padded_log_probs(
        self,
        tokens: Tensor,
        rows: Tensor,
        positions: Tensor,
        targets: Tensor,
        prefix: SharedPrefix | TokenRows | None,
    ) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {"use_cache": False}
        if isinstance(prefix, SharedPrefix):
            given = {"past_key_values": prefix.cache, "use_cache": True}
        elif prefix is not None:
            tokens, positions = (
                torch.cat([torch.tensor(prefix.ids).expand(len(tokens), -1), tokens], 1),
                positions + prefix.length,
            )
        return self._read(tokens, given, rows, positions, targets)

    def _separate_log_probs(
        self,
        tokens: Tensor,
        seen: Tensor,
        rows: Tensor,
        positions: Tensor,
        targets: Tensor,
        prefix: SharedPrefix | TokenRows | None,
    ) -> tuple[Tensor, Tensor]:
        """Each row by itself, whole: in some models the longest row of a batch changes what all of them give."""
        if being_traced():
            limit = "" if self._switch_length is None else f" beyond {self._switch_length} tokens"
            raise UserError(
                f"{self.name} gives other predictions for rows that are read together{limit}: its attention cannot be "
                "analysed"
            )
        before = torch.tensor([] if prefix is None else list(prefix.ids), dtype=torch.long)
        log_p, likeliest = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        for row in rows.unique().tolist():
            own = rows == row
            whole = torch.cat([before, tokens[row, seen[row]]])[None]
            places = positions[own] + len(before)
            log_p[own], likeliest[own] = self._read(
                whole, {"use_cache": False}, torch.zeros_like(places), places, targets[own]
            )
        return log_p, likeliest

    def _packed_log_probs(
        self, tokens: Tensor, seen: Tensor, rows: Tensor, positions: Tensor, targets: Tensor, prefix: SharedPrefix
    ) -> tuple[Tensor, Tensor]:
        together = PackedRows(seen, prefix)
        given = {"past_key_values": prefix.cache, "use_cache": True, "position_ids": together.positions}
        if self._takes_cache_position:  # transformers 4
            given["cache_position"] = together.positions[0]
        with packed(together):
            return self._read(
                tokens[seen][None], given, torch.zeros_like(rows), together.number[rows, positions], targets
            )

    @cached_property
    def _packs_rows(self) -> bool:
        """Whether rows may go through the model without padding: where a small example then gives what padded rows
        give."""
        from transformers import DynamicCache

        window = any(type(layer).__name__ != "DynamicLayer" for layer in DynamicCache(config=self.model.config).layers)
        momentum = (
            getattr(self.config, "momentum_kind", "none") != "none"
        )  # its past is values that packed rows do not see
        if window or momentum:
            return False
        prefix, tokens = self.start([1, 2, 3]), torch.tensor([[4, 5, 6], [7, 0, 0]])
        assert isinstance(prefix, SharedPrefix)
        own = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 0]), torch.tensor([1, 2, 3])
        try:
            found, _ = self._packed_log_probs(tokens, tokens > 0, *own, prefix)
        except Exception:  # whatever a model does not take
            return False
        return torch.allclose(found, self._padded_log_probs(tokens, *own, prefix)[0], rtol=1e-4, atol=1e-4)

    def _read(
        self, tokens: Tensor, given: dict[str, Any], rows: Tensor, positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs the model over tokens (B, T)."""
        if self._switch_length is not None:
            reset_rotary(self.model)
        pairs, which = distinct_positions(rows, positions)
        row, position = pairs.to(self.device)
        if self._selects_logits:
            # The output projection sees scored positions alone; what the model does to logits after it, as capping,
            # stays.
            output: Any = self.model.get_output_embeddings()
            hook = output.register_forward_pre_hook(lambda module, inputs: (inputs[0][row, position][None],))
            try:
                logits = self.model(tokens.to(self.device), **given).logits[0]
            finally:
                hook.remove()
        else:
            logits = self.model(tokens.to(self.device), **given).logits[row, position]
        return target_log_probs(lambda part: logits[part], which, targets, logits.shape[-1])

    @inference
    def step(
        self, tokens: Tensor, padding: Tensor, state: KeyValueRows | TokenRows | None = None
    ) -> tuple[Tensor, KeyValueRows | TokenRows]:
        """As :meth:`momentum_lm.lm.protocol.LanguageModel.step`."""
        return self._step(tokens, padding, state, self._stepping)

    def _step(self, tokens: Tensor, padding: Tensor, state: Any, way: str) -> tuple[Tensor, Any]:
        """``way``: ``shared``, from keys and values of a shared prefix; ``cached``, from those of the rows alone; or
        ``whole``, every row by itself and read again at each step."""
        if way == "whole":
            before = state.tokens if state is not None else [[]] * len(tokens)
            rows = [
                [*old, *row[~pad].tolist()] for old, row, pad in zip(before, tokens.cpu(), padding.cpu(), strict=True)
            ]
            return torch.cat([self._plain_logits(torch.tensor([row]), 1)[:, -1] for row in rows]), TokenRows(rows)
        if not isinstance(state, KeyValueRows):
            shared = state.shared if state is not None and way == "shared" else None
            if state is not None and shared is None:  # the prefix is read with every row, after its padding
                columns = torch.arange(state.length + tokens.shape[1])
                index = (columns - state.length).clamp(min=0)
                count = padding.long().sum(1, keepdim=True)
                own = columns - count  # place in the row of prefix and tokens
                before = torch.tensor(state.tokens)
                tokens = torch.where(
                    own >= state.length,
                    tokens.cpu()[:, index],
                    before.gather(1, own.clamp(0, state.length - 1)),
                )
                padding = own < 0
            state = KeyValueRows(len(tokens), self.device, shared)
        positions = state.follow(padding)
        given: dict[str, Any] = {"attention_mask": state.seen.long(), "past_key_values": state.cache, "use_cache": True}
        if self._takes_position_ids:
            given["position_ids"] = positions
        if self._takes_logits_to_keep:
            given["logits_to_keep"] = 1
        return self.model(tokens.masked_fill(padding.to(tokens.device), 0).to(self.device), **given).logits[
            :, -1
        ], state

    @cached_property
    def _stepping(self) -> str:
        """The quickest way to generate (:meth:`_step`) in which a trial gives what it gives for whole rows."""
        if not self.shares_prefixes or not self._pads_rows or self._switch_length is not None:
            return "whole"
        first, whole = trial_lengths(self.config, self.max_positions)
        ids = trial_tokens(self.config, self.vocab_size, 2, whole)
        ids[1, :first] = ids[0, :first]
        short = min(whole, max(first + 2, whole - 4))  # the second row is padded and ends there; both go on by a token
        tokens, padding = ids[:, first : whole - 1].clone(), torch.zeros(2, whole - 1 - first, dtype=torch.bool)
        pad = whole - short
        tokens[1], padding[1, :pad] = ids[1, first : whole - 1].roll(pad), True
        last = torch.tensor([whole - 1, short - 1])
        with shortened_windows(self.model):
            rows = [ids[i : i + 1, : end + 1] for i, end in enumerate(last.tolist())]
            expected = torch.stack([self._plain_log_probs(row)[0, -2:] for row in rows])
            for way in ("shared", "cached"):
                try:
                    state = self.start(ids[0, :first].tolist()).rows(2)
                    one, state = self._step(tokens, padding, state, way)
                    two, state = self._step(ids[[0, 1], last][:, None], torch.zeros(2, 1, dtype=torch.bool), state, way)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # whatever a model does not take
                    continue
                found = torch.stack([one, two], 1).float().log_softmax(-1).cpu()
                if apart(found, expected) <= tolerance(self.dtype):
                    return way
        return "whole"

    def _whole_prompts(self, ids: Tensor, targets: Tensor, first: int) -> Tensor:
        """ids (3, T) -> log-probabilities of ``targets`` after each token (3, T, N). The first two rows begin with the
        same ``first`` tokens. Raises UserError for a model that is no causal language model.
        """
        kind = type(self.model).__name__
        try:
            plain = self._plain_log_probs(ids)[..., targets]
        except torch.OutOfMemoryError:
            raise  # of a GPU, which others may fill
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{self.name} ({kind}) does not run on text alone: {reason}") from error
        if plain.isnan().any():
            raise UserError(
                f"{self.name} ({kind}) gives probabilities of NaN: its weights are broken, or too large for "
                f"{self.dtype}"
            )
        if apart(plain[1, :first], plain[0, :first]) > tolerance(self.dtype):
            raise UserError(
                f"{self.name} ({kind}) is not a causal language model: what it predicts depends on tokens that "
                "come later; give a model that was trained to continue text"
            )
        return plain

    def _verify(self) -> None:
        """Tries the model, and settles on the quickest way of reading prompts in which it gives what it gives for whole
        prompts alone.
        """
        first, whole = trial_lengths(self.config, self.max_positions)
        ids = trial_tokens(self.config, self.vocab_size, 4, whole)
        other, changed = ids[0].clone(), ids[0].clone()
        other[:first] = ids[1, :first]  # another beginning: what the beginning is for
        changed[first:] = ids[2, first:]
        short = changed[: first + max(1, (whole - first) // 4)]
        targets = torch.unique(ids[3])
        rows = torch.tensor([0] * (whole - first) + [1] * (len(short) - first))
        positions = torch.cat([torch.arange(whole - first), torch.arange(len(short) - first)])
        tokens = torch.zeros(2, whole - first, dtype=torch.long)
        tokens[0], tokens[1, : len(short) - first] = ids[0, first:], short[first:]
        padding = torch.arange(tokens.shape[1]) >= torch.tensor([whole, len(short)])[:, None] - first
        kind = type(self.model).__name__
        with shortened_windows(self.model):
            plain = self._whole_prompts(torch.stack([ids[0], changed, other]), targets, first)
            expected = torch.cat([plain[0, first:], self._plain_log_probs(short[None])[0, first:, targets]])
            close = min(tolerance(self.dtype), 0.25 * apart(plain[2, first:], plain[0, first:]) + 1e-6)

            def right() -> bool:
                row, position = (x.repeat_interleave(len(targets)) for x in (rows, positions))
                try:
                    state = self.start(ids[0, :first].tolist())
                    found = self.log_probs(tokens, padding, row, position, targets.repeat(len(rows)), state)[0].view(
                        len(rows), -1
                    )
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # whatever a model does not take
                    return False
                return apart(found, expected) <= close

            remembers_more = not self.shares_prefixes
            sharing = [] if remembers_more else [(True, True, True), (True, False, True)]
            for ways in (*sharing, (False, True, True), (False, False, True), (False, False, False)):
                self.shares_prefixes, self._selects_logits, self._pads_rows = ways
                if right():
                    break
            else:
                raise UserError(
                    f"{self.name} ({kind}) gives other predictions for the same prompt when it is read again or in a "
                    "batch"
                )
        if not self.shares_prefixes:
            why = (
                "remembers more than keys and values"
                if remembers_more
                else "gives something else after keys and values of a prefix"
            )
            one_by_one = "" if self._pads_rows else " and one by one"
            _log.warning("%s %s: prompts are read as a whole%s, which takes longer", self.name, why, one_by_one)

    def _plain_log_probs(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, vocabulary): the model as it is."""
        return F.log_softmax(self._plain_logits(tokens).float(), -1).cpu()

    @inference
    def _plain_logits(self, tokens: Tensor, last: int = 0) -> Tensor:
        if self._switch_length is not None:
            reset_rotary(self.model)
        given = {"logits_to_keep": last} if last and self._takes_logits_to_keep else {}
        return self.model(tokens.to(self.device), use_cache=False, **given).logits


def load_huggingface(
    name: str,
    gguf_file: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> HuggingFaceLM:
    """Loads a causal model and its tokenizer from the hub or a folder; ``gguf_file`` is the name of a file there.

    ``dtype`` None is fp32. ``trust_remote_code`` lets the model run code of its own. Raises UserError where
    transformers is not installed or does not load the model.
    """
    limit_onednn_caches()
    try:
        import transformers
    except ImportError as error:
        raise UserError(arg("name"), " needs transformers: pip install 'momentum_lm[transformers]'") from error
    given: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file:
        given["gguf_file"] = gguf_file
        folder = Path(name)
        if folder.is_dir() and not (folder / gguf_file).exists():
            raise UserError(arg(gguf_file=gguf_file), f": {folder} holds no such file")
    if not Path(name).is_dir() and not hub_answers():
        given["local_files_only"] = True  # what earlier downloads left
    unchanged = Unchanged(_files(name, gguf_file))
    try:
        with header_read_once(gguf_file):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, **given)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype or torch.float32, **given)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                arg(name=name),
                " brings code of its own: add ",
                arg(trust_remote_code=True),
                " if you trust it",
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(arg(name=name), f" does not load: {reason}") from error
    digest = _digest(name, gguf_file, model)
    unchanged.check()
    return HuggingFaceLM(model.to(device), tokenizer, name, digest, unchanged)


def _files(name: str, gguf_file: str | None) -> list[Path]:
    """The files of a folder that say what the model computes, code of its own included; none of a model of the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return []
    if gguf_file:
        return [folder / gguf_file]
    return [*sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)), folder / "config.json"]


def _digest(name: str, gguf_file: str | None, model: Any) -> str:
    """Of the files of a folder that say what the model computes; of name and commit for a model of the hub."""
    folder = Path(name)
    if not folder.is_dir():
        return hashlib.sha256(f"{name} {getattr(model.config, '_commit_hash', None)}".encode()).hexdigest()
    return file_sha256(*_files(name, gguf_file))

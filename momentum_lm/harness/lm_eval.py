"""lm-evaluation-harness on our checkpoints: ``lm_eval --model momentum_lm --model_args path=CKPT --tasks ...``.

``fairseq_compat`` tells the harness of this class. Where no ``.pth`` file is read (PYTHONPATH, ``pip --target``),
import this module.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lm_eval.models  # noqa: F401  (the harness reads its list of models only while its register is empty)
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from momentum_lm.errors import Argument, UserError, as_word, named
from momentum_lm.formats.to_huggingface import names_of_tokens
from momentum_lm.icl.engine import MOST_GENERATED, Request, common_length, generate, score
from momentum_lm.icl.sampling import likeliest, sample
from momentum_lm.lm.native import NativeLM, load_native
from momentum_lm.model.precision import DTYPES
from momentum_lm.system import import_user_dir
from momentum_lm.text.dictionary import PAD, SPECIALS

_AT_ONCE = 256  # requests whose texts are encoded together
_log = logging.getLogger(__name__)


@register_model("momentum_lm")
class MomentumLM(LM):
    """A fairseq checkpoint, ours, a stock ``transformer_lm*`` or a published dense LM, as lm-evaluation-harness asks
    it.

    A prompt begins with the token that the model's training inputs began with (``NativeLM.bos``), as for
    ``fairseq-eval``, and an empty one is that token alone. What is longer than the model's context loses its beginning,
    that token included. A continuation's tokens are those in which the prompt with it differs from the prompt without,
    whose final white space counts as the continuation's.

    A text that spells a special token is that token: ``<s>``, ``</s>`` and ``<unk>`` for fairseq's tokenizers, and for
    a ``tokenizer.json`` what it says itself. So it is with ``--model hf`` on every model (``<|endoftext|>`` with
    GPT-2), and there a prompt that begins with the text of the first token gets no other; ``--model hf`` on what
    ``momentum-lm convert`` makes of the checkpoint sees the same ids. A text with ``<pad>`` is refused: padding is no
    token to the model. ``fairseq-eval``, whose texts are data, reads all such names as ordinary text.

    Arguments, those of ``--model_args``: path: checkpoint file, or a folder with one; or a loaded ``NativeLM``, to
        which ``tokenizer`` to ``trust_checkpoint`` do not apply. tokenizer: its folder or file; None: beside the
        checkpoint, or in the data that it was trained on. dtype: ``fp32``, ``bf16`` or ``fp16``. device: as torch names
        it; None: a GPU if there is one. model_overrides: options that the checkpoint lacks,
        ``{"decoder_attention_heads": 8}``. trust_checkpoint: load one that holds more than plain data. user_dir: a
        folder of Python code to import first, such as filters of one's own. max_length: use no more of the model's
        context than so many tokens. max_gen_toks: tokens to generate where a task does not say. batch_size: rows in a
        batch, at most (memory may ask for fewer); ``auto``: what memory allows, and at most ``max_batch_size``.

    Raises UserError for arguments that cannot be, and in one of several processes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | NativeLM | None = None,
        tokenizer: str | None = None,
        dtype: str = "fp32",
        device: str | None = None,
        model_overrides: Mapping[str, Any] | str | None = None,
        trust_checkpoint: bool = False,
        user_dir: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = [name for name in inspect.signature(MomentumLM).parameters if name != "unknown"]
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"--model_args {name}: " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}")
            )
        world = os.environ.get("WORLD_SIZE", "1")
        if world not in ("", "0", "1"):
            raise UserError(
                f"momentum_lm runs in one process, and this is one of {world} (WORLD_SIZE): start lm_eval by itself"
            )
        if user_dir is not None:
            with named(_model_args):
                import_user_dir(user_dir)
        if path is None:
            raise UserError("--model_args lacks path=CKPT: a checkpoint file, or a folder with one")
        self.lm = (
            path
            if isinstance(path, NativeLM)
            else _load(path, tokenizer, dtype, device, model_overrides, trust_checkpoint)
        )
        self._device = self.lm.device
        self.max_length = _number("max_length", max_length, self.lm.max_positions)
        if self.max_length > self.lm.max_positions:
            raise UserError(
                f"--model_args max_length={max_length}: {self.lm.name} takes {self.lm.max_positions} tokens; give no "
                "more"
            )
        self.max_gen_toks = _number("max_gen_toks", max_gen_toks, 256)
        self._special = names_of_tokens(self.lm)
        auto = str(batch_size).partition(":")[0] == "auto"
        self._rows = (
            _number("max_batch_size", max_batch_size, None) if auto else _number("batch_size", batch_size, None)
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> MomentumLM:
        """As :meth:`create_from_arg_obj`, from ``path=CKPT,dtype=bf16``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MomentumLM:
        """From ``--model_args``, which win over the command's ``--device`` and ``--batch_size``: it has values for
        these whether given or not, ``cuda:0`` too where there is none.
        """
        command = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if str(command.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            del command["device"]
        return cls(**{**command, **arg_dict})

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer is, which tells it from others."""
        return str(self.lm.tokenizer_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """None of ours has one. Raises UserError where one is asked for."""
        if chat_template:
            raise UserError(
                f"{self.lm.name} was trained on plain text and has no chat template: leave out --apply_chat_template"
            )
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises UserError."""
        return self.chat_template(True)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.lm.model.parameters()),
            "model_dtype": str(self.lm.dtype),
            "model_sha": self.lm.sha256,
            "model_architecture": asdict(self.lm.config),
            "max_length": self.max_length,
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each continuation after its context."""
        pairs = [request.args for request in requests]
        continuations: list[Request] = []
        with tqdm(total=len(pairs), desc="Tokenizing inputs", disable=disable_tqdm) as bar:
            for some in _parts(pairs):
                continuations += self._requests(some)
                bar.update(len(some))
        self._warn([len(request.read) for request in continuations], self.max_length)
        return self._score([self._shortened(request) for request in continuations], disable_tqdm, pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each text, in windows of ``max_length`` tokens that score every token once."""
        windows: list[Request] = []
        counts = []
        for some in _parts([request.args[0] for request in requests]):
            for tokens in self._encode(some):
                before = len(windows)
                for pair in get_rolling_token_windows(tokens, self.lm.bos[-1], self.max_length, context_len=1):
                    context, continuation = make_disjoint_window(pair)
                    windows.append(Request(array("i", context), array("i", continuation)))
                counts.append(len(windows) - before)
        answers = iter(self._score(windows, disable_tqdm))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, without what it ends at.

        Arguments of a task are those of the harness's own models: ``until`` and ``max_gen_toks`` (or its other names),
        and ``do_sample`` with ``temperature``, ``top_k`` and ``top_p``. Raises UserError for others, and where no room
        is left for a context.
        """
        texts: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for numbers in kinds.values():
                ending = _Ending(self.lm, requests[numbers[0]].args[1], self.max_gen_toks)
                for number, text in self._generate({number: requests[number].args[0] for number in numbers}, ending):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: Mapping[int, str], ending: _Ending) -> Iterator[tuple[int, str]]:
        room = self.max_length - ending.most
        if room < 1:
            raise UserError(
                f"max_gen_toks={ending.most} leaves no room for a prompt in the {self.max_length} tokens that "
                f"{self.lm.name} takes: "
                f"add --gen_kwargs max_gen_toks=N, such as {self.max_length // 2}"
            )
        whole = {
            number: self._begun(tokens)
            for number, tokens in zip(contexts, self._encode(list(contexts.values())), strict=True)
        }
        self._warn([len(tokens) for tokens in whole.values()], room)
        kept = {number: tokens[-room:] for number, tokens in whole.items()}
        numbers, rows = list(kept), self._rows or MOST_GENERATED
        generated = generate(self.lm, list(kept.values()), ending.most, ending.finished, ending.choose, rows)
        yield from ((numbers[i], ending.text(tokens)) for i, tokens in generated)

    def _score(
        self, requests: Sequence[Request], disable_tqdm: bool, names: Sequence[Any] | None = None
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for number, answer in score(self.lm, requests, self._rows):
                answers[number] = answer.log_prob, answer.greedy
                if names is not None:
                    self.cache_hook.add_partial("loglikelihood", names[number], answers[number])
                bar.update()
        return [answers[number] for number in range(len(requests))]

    def _requests(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        texts: dict[str, int] = {}  # every text once: choices mostly share their context
        for context, continuation in pairs:
            texts.setdefault(context.rstrip(), len(texts))
            texts.setdefault(context + continuation, len(texts))
        tokens = self._encode(list(texts))
        found = []
        for context, continuation in pairs:
            whole = tokens[texts[context + continuation]]
            start = common_length(tokens[texts[context.rstrip()]], whole)
            if start == len(whole):
                raise UserError(f"the continuation {continuation!r} has no tokens; fix the task's data")
            found.append(Request(array("i", self._begun(whole[:start])), array("i", whole[start:])))
        return found

    def _shortened(self, request: Request) -> Request:
        cut = max(0, len(request.read) - self.max_length)
        if cut >= len(request.context):
            limit = f"{self.lm.name} takes {self.max_length}"
            raise UserError(f"a continuation has {len(request.continuation)} tokens, but {limit}; fix the task's data")
        return Request(request.context[cut:], request.continuation)

    def _begun(self, tokens: list[int]) -> list[int]:
        bos = list(self.lm.bos)
        return tokens if bos and tokens[: len(bos)] == bos else bos + tokens

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        special = {name: [token] for name, token in self._special.items()}
        names = "|".join(map(re.escape, special))
        split = [[part for part in re.split(f"({names})", text) if part] if names else [text] for text in texts]
        plain = list({part for parts in split for part in parts} - special.keys())
        ids = dict(zip(plain, self.lm.encode(plain), strict=True)) | special
        encoded = [[token for part in parts for token in ids[part]] for parts in split]
        for text, tokens in zip(texts, encoded, strict=True):
            if PAD in tokens:
                what = f"a prompt holds {SPECIALS[PAD]}, the padding of {self.lm.name}, which it cannot read"
                raise UserError(f"{what}: {_excerpt(text)}")
        return encoded

    def _warn(self, lengths: Sequence[int], most: int) -> None:
        long = sum(length > most for length in lengths)
        if long:
            _log.warning(
                "%d of %d prompts are longer than %d tokens and lose their beginning", long, len(lengths), most
            )


class _Ending:
    """How a task wants its texts generated: which token is taken, and where a text ends."""

    def __init__(self, lm: NativeLM, arguments: Mapping[str, Any], default_most: int) -> None:
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), default_most))
        self._lm = lm
        self.most: int = given.pop("max_gen_toks")
        self._until = [text for text in given.pop("until") if text]
        # A stop that has just been completed is in the last tokens: each but the special ones, which have no text, is a
        # byte or more.
        self._tail = 8 + max((len(text.encode()) for text in self._until), default=0)
        temperature = given.pop("temperature", 1.0)
        drawn = given.pop("do_sample") and temperature > 0
        top = {name: value for name in ("top_k", "top_p") if (value := given.pop(name, None)) is not None}
        if not isinstance(top.get("top_k", 0), int) or top.get("top_k", 0) < 0:
            raise UserError(f"generation argument top_k={top['top_k']}: give a whole number, 0 for all tokens")
        if not 0 < float(top.get("top_p", 1)) <= 1:
            raise UserError(f"generation argument top_p={top['top_p']}: give a number above 0 and at most 1")
        for name, value in given.items():
            if (name, value) != ("num_beams", 1):
                raise UserError(
                    f"generation argument {name}={value!r}: momentum_lm has until, max_gen_toks, do_sample, "
                    "temperature, top_k and top_p"
                )
        self.choose: Callable[[torch.Tensor], torch.Tensor] = likeliest
        if drawn:
            self.choose = functools.partial(sample, temperature=temperature, **top)

    def finished(self, tokens: list[int]) -> bool:
        """Whether the last token completes what the text is to end at."""
        end = self._lm.tokenizer.decode(tokens[-self._tail :])
        return any(text in end for text in self._until)

    def text(self, tokens: list[int]) -> str:
        """The text of generated tokens, up to where it ends."""
        return postprocess_generated_text(self._lm.tokenizer.decode(tokens), self._until, None)


def _load(
    path: str | os.PathLike[str],
    tokenizer: str | None,
    dtype: str,
    device: str | None,
    model_overrides: Mapping[str, Any] | str | None,
    trust_checkpoint: bool,
) -> NativeLM:
    if dtype not in DTYPES:
        raise UserError(f"--model_args dtype={dtype}: choose from {', '.join(DTYPES)}")
    with named(_model_args):
        lm = load_native(str(path), model_overrides, trust_checkpoint, _device(device), DTYPES[dtype], tokenizer)
        lm.tokenizer  # noqa: B018  (now, not after the tasks' data was read)
    return lm


def _model_args(argument: Argument) -> str:
    """What ``--model_args`` calls an argument of load_native."""
    name = {"overrides": "model_overrides", "trust": "trust_checkpoint"}.get(argument.name, argument.name)
    return f"--model_args {name}" + (f"={as_word(argument.value)}" if argument.has_value else "")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise UserError(f"--model_args device={name}: no such device; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--model_args device={name}: torch sees {torch.cuda.device_count()} CUDA devices; see `momentum-lm doctor`"
        )
    return device


def _number(name: str, value: Any, default: int | None) -> Any:
    """The value of an argument that is a whole number above 0, or the default for None."""
    if value is None:
        return default
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)) or int(value) < 1:
        raise UserError(f"--model_args {name}={value}: give a whole number above 0")
    return int(value)


def _excerpt(text: str) -> str:
    place = max(0, text.find(SPECIALS[PAD]) - 30)
    return repr(text[place : place + 60])


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _AT_ONCE):
        yield items[start : start + _AT_ONCE]

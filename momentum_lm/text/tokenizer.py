"""Text to fairseq token ids and back: SentencePiece, GPT-2's byte-level BPE and Hugging Face tokenizers behind one
interface.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from momentum_lm.errors import UserError, arg
from momentum_lm.files import refuse_pipes
from momentum_lm.text.dictionary import BOS, EOS, PAD, SPECIALS, UNK, Dictionary
from momentum_lm.untrusted import parse_json

_MOST_IDS = 1 << 24  # ids that a tokenizer may have: memory is taken for each up to the largest


class Tokenizer:
    """Base: maps a tokenizer's own ids to those of a fairseq dictionary. Subclasses give ``_encode``, ``_decode`` and
    ``_symbols``.

    ``files`` are what ``load_tokenizer`` needs beside ``dict.txt``: their names there, and where they are now.
    """

    kind = ""
    lossless = False
    bos, pad, eos, unk = BOS, PAD, EOS, UNK

    def __init__(self, files: dict[str, Path], symbols: Sequence[str], dictionary: Dictionary | None) -> None:
        """``symbols[i]`` is the dictionary's symbol for the tokenizer's own id ``i``."""
        self.files = files
        self.dictionary = dictionary or Dictionary(s for s in symbols if s not in SPECIALS).padded()
        self._to_dictionary = np.array([self.dictionary.index(s) for s in symbols], dtype=np.int64)
        self._identity = bool((self._to_dictionary == np.arange(len(symbols))).all())
        own = {int(d): i for i, d in enumerate(self._to_dictionary) if d >= len(SPECIALS)}
        self._to_own = [own.get(i, -1) for i in range(len(self.dictionary))]
        if not own:
            raise UserError(
                f"{', '.join(map(str, files.values()))} and its dict.txt have no symbol in common: they belong to "
                "different models"
            )

    @property
    def vocab_size(self) -> int:
        """Entries of the dictionary, specials and padding included: the size of the embedding."""
        return len(self.dictionary)

    @property
    def own_to_dictionary(self) -> list[int]:
        """The dictionary's id of each of the tokenizer's own ids."""
        return self._to_dictionary.tolist()

    def encode(self, text: str) -> list[int]:
        """Dictionary ids of ``text``, without ``<s>`` or ``</s>``. Raises UnicodeEncodeError for a lone surrogate."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text."""
        own = self._encode(texts)
        return own if self._identity else [self._to_dictionary[ids].tolist() if ids else [] for ids in own]

    def encode_as_text(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, where special tokens' names are ordinary text as far as the tokenizer can do so."""
        return self.encode_batch(texts)

    def special_tokens_in(self, texts: Sequence[str]) -> int:
        """How many special tokens ``encode`` finds spelled out. SentencePiece and GPT-2's BPE find none."""
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        """The text of dictionary ids. ``<s>``, ``<pad>``, ``</s>`` and made-up words have none;
        ``<unk>`` gives U+FFFD.
        """
        text, run = [], []
        for i in map(int, ids):
            own = self._to_own[i]
            if own >= 0:
                run.append(own)
            elif i == UNK:
                text += [self._decode(run), "\ufffd"]
                run = []
        return "".join([*text, self._decode(run)])

    def sha256(self) -> str:
        """Of the tokenizer's files and the dictionary's symbols: equal digests give equal ids."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(hashlib.sha256(self.files[name].read_bytes()).digest())
        digest.update("\n".join(self.dictionary.symbols).encode())
        return digest.hexdigest()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def _decode(self, own_ids: list[int]) -> str:
        raise NotImplementedError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Dictionary symbols are its pieces, its control and unknown pieces are fairseq's specials.

    ``lossless``: ``decode(encode(x)) == x`` for every text, as models of ``train_sentencepiece`` do; others normalise
    the text. Raises UserError if ``path`` is not a SentencePiece model.
    """

    kind = "sentencepiece"
    _SPACE = "\u2581"  # SentencePiece's own sign for a space; one that stands in the text must go through its bytes

    def __init__(self, path: str | os.PathLike[str], dictionary: Dictionary | None = None) -> None:
        import sentencepiece

        path = Path(path)
        refuse_pipes(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            pieces = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a SentencePiece model (the .model file that spm_train writes)") from error
        if len(pieces) < 4:
            raise UserError(
                f"{path} is not a SentencePiece model (the .model file that spm_train writes): it holds {len(pieces)} "
                "pieces"
            )
        special = {
            self._model.bos_id(): BOS,
            self._model.pad_id(): PAD,
            self._model.eos_id(): EOS,
            self._model.unk_id(): UNK,
        }
        symbols = [
            SPECIALS[special[i]] if i in special else "<unk>" if self._model.is_control(i) else _one_line(piece)
            for i, piece in enumerate(pieces)
        ]
        super().__init__({"sentencepiece.model": path}, symbols, dictionary)
        self._bytes = [self._model.piece_to_id(f"<0x{b:02X}>") for b in self._SPACE.encode()]
        probe = " a  b \n\tc "
        self.lossless = (
            all(map(self._model.is_byte, self._bytes)) and self._model.decode(self._model.encode(probe)) == probe
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encoded = self._model.encode(list(texts), num_threads=1)
        except TypeError:
            "".join(texts).encode()  # says where there is half a surrogate pair
            raise
        escape = [self.lossless and self._SPACE in text for text in texts]
        return [self._escaped(text) if odd else ids for text, ids, odd in zip(texts, encoded, escape, strict=True)]

    def _escaped(self, text: str) -> list[int]:
        first, *rest = self._model.encode(text.split(self._SPACE), num_threads=1)
        return functools.reduce(lambda ids, part: ids + self._bytes + part, rest, first)

    def _decode(self, own_ids: list[int]) -> str:
        return self._model.decode(own_ids)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE (Radford et al., 2019) from ``encoder.json`` and ``vocab.bpe``. Dictionary symbols are its
    ids in decimal, as in the published fairseq dense language models. Lossless. Raises UserError if a file is missing
    or not what it should be.
    """

    kind = "gpt2_bpe"
    lossless = True
    _WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    _CACHE = 1 << 17  # words; about 40 MB when full

    def __init__(self, folder: str | os.PathLike[str], dictionary: Dictionary | None = None) -> None:
        import regex

        files = {name: Path(folder) / name for name in ("encoder.json", "vocab.bpe")}
        refuse_pipes(*files.values())
        try:
            encoder: dict[str, int] = parse_json(files["encoder.json"].read_bytes())
            merges = files["vocab.bpe"].read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
        except OSError as error:
            raise UserError(f"cannot read the GPT-2 tokenizer: {error.filename}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{folder}/encoder.json and vocab.bpe are not GPT-2's tokenizer: {error}") from error
        pairs = [tuple(line.split(" ")) for line in merges]
        is_plain = isinstance(encoder, dict) and all(type(own_id) is int for own_id in encoder.values())
        if not is_plain or sorted(encoder.values()) != list(range(len(encoder))):
            raise UserError(
                f"{files['encoder.json']} is not GPT-2's encoder.json: its ids are not 0 to {len(encoder) - 1}"
            )
        if any(len(pair) != 2 or "".join(pair) not in encoder for pair in pairs):
            raise UserError(
                f"{files['vocab.bpe']} does not belong to {files['encoder.json']}: a merge gives a token that has no id"
            )
        super().__init__(files, [str(i) for i in range(len(encoder))], dictionary)
        self._split = regex.compile(self._WORD).findall
        self._letters = _byte_letters()
        self._byte_of = {letter: byte for byte, letter in enumerate(self._letters)}
        self._encoder, self.tokens = encoder, sorted(encoder, key=encoder.__getitem__)
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._cache: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text. Words met before come from a cache of dictionary ids, which is what
        makes it fast.
        """
        cache, result = self._cache, []
        for text in texts:
            ids: list[int] = []
            for word in self._split(text):
                found = cache.get(word)
                if found is None:
                    if len(cache) >= self._CACHE:
                        cache.clear()
                    found = cache[word] = self._merge(word)
                ids += found
            result.append(ids)
        return result

    @property
    def merges(self) -> list[tuple[str, ...]]:
        """Pairs of tokens in the order in which they were learnt to be one."""
        return list(self._ranks)

    def _merge(self, word: str) -> list[int]:
        """Joins the pair that was learnt first, wherever it stands, until no pair is left that was learnt."""
        parts = [self._letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                pair = i + 1 < len(parts) and (parts[i], parts[i + 1]) == best
                joined.append(parts[i] + parts[i + 1] if pair else parts[i])
                i += 2 if pair else 1
            parts = joined
        return self._to_dictionary[[self._encoder[part] for part in parts]].tolist()

    def _decode(self, own_ids: list[int]) -> str:
        letters = "".join(self.tokens[i] for i in own_ids)
        return bytes(self._byte_of[letter] for letter in letters).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` through the ``tokenizers`` package. Special tokens are not added; those that the text spells
    out are found unless ``tokenizer_config.json`` beside it says ``split_special_tokens``.

    Dictionary symbols (``symbols``, by the tokenizer's own ids) are those ids in decimal. The tokens that
    ``tokenizer_config.json`` names as ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token`` are fairseq's
    specials (the first of eos, bos, pad, unk where one is several). Where that or their names make ids 0 to 3
    fairseq's, the tokenizer has a dictionary's ids already, and no special beside.
    """

    kind = "huggingface"
    lossless = False  # depends on its normaliser, which is not looked into
    _ROLES = {"unk_token": UNK, "pad_token": PAD, "bos_token": BOS, "eos_token": EOS}  # noqa: RUF012

    def __init__(self, path: str | os.PathLike[str], dictionary: Dictionary | None = None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("a tokenizer.json needs the package tokenizers: pip install tokenizers") from error
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        refuse_pipes(path)
        if not path.is_file():
            raise UserError(f"{path} is missing")
        try:
            self._model: Any = tokenizers.Tokenizer.from_buffer(path.read_bytes())  # by name only UTF-8 will do
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
        except BaseException as error:  # the package raises plain Exception, and where it fails in Rust not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path} is not a tokenizer.json that this version of tokenizers reads: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        files = {"tokenizer.json": path}
        settings: dict[str, Any] = {}
        if (beside := path.with_name("tokenizer_config.json")).is_file():
            files[beside.name] = beside
            try:
                settings = dict(parse_json(beside.read_bytes()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{beside} is not a JSON object: {error}") from error
        self._model.encode_special_tokens = bool(settings.get("split_special_tokens"))
        ids: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        most = max(ids.values(), default=-1)
        if not 0 <= most < _MOST_IDS:
            raise UserError(f"{path} is no tokenizer of a language model: its largest id is {most}")
        self.symbols = [str(i) for i in range(1 + max(ids.values()))]
        for role, special in self._ROLES.items():
            token = settings.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in ids:
                self.symbols[ids[token]] = SPECIALS[special]
        if all(ids.get(name) == i or self.symbols[i : i + 1] == [name] for i, name in enumerate(SPECIALS)):
            self.symbols = [
                *SPECIALS,
                *map(str, range(len(SPECIALS), len(self.symbols))),
            ]  # a role that lies elsewhere is no special
        super().__init__(files, self.symbols, dictionary)

    def encode_as_text(self, texts: Sequence[str]) -> list[list[int]]:
        before = self._model.encode_special_tokens
        self._model.encode_special_tokens = True
        try:
            return self.encode_batch(texts)
        finally:
            self._model.encode_special_tokens = before

    def special_tokens_in(self, texts: Sequence[str]) -> int:
        if self.splits_special_tokens or self._special is None:
            return 0
        return sum(len(self._special.findall(text)) for text in texts)

    @functools.cached_property
    def _special(self) -> re.Pattern[str] | None:
        added = self._model.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special and token.content]
        longest_first = sorted(names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if names else None

    def token(self, own_id: int) -> str:
        """What the tokenizer calls its id."""
        return str(self._model.id_to_token(own_id))

    @property
    def splits_special_tokens(self) -> bool:
        """Whether the names of special tokens are ordinary text to it."""
        return bool(self._model.encode_special_tokens)

    @property
    def prefix(self) -> list[int]:
        """Dictionary ids of what the tokenizer itself puts before a text."""
        plain, special = (self._model.encode("a", add_special_tokens=added).ids for added in (False, True))
        return self._to_dictionary[prefix_of(plain, special)].tolist()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._model.encode_batch(list(texts), add_special_tokens=False)]
        except BaseException as error:  # as above
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            problem = " ".join(str(error).split())[:300]
            file = self.files["tokenizer.json"]
            raise UserError(f"{file} cannot take a text ({problem}); use another tokenizer") from error

    def _decode(self, own_ids: list[int]) -> str:
        return self._model.decode(own_ids, skip_special_tokens=False)


def prefix_of(plain: list[int], special: list[int]) -> list[int]:
    """What a tokenizer puts before a text, whose ids are ``special`` with it and ``plain`` without."""
    before = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return special[:before]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a data or checkpoint folder: ``dict.txt`` and ``*.model``, ``encoder.json`` + ``vocab.bpe`` or
    ``tokenizer.json``.

    ``path`` may also be a file in such a folder (a checkpoint, dict.txt, the tokenizer itself). Without a ``dict.txt``
    the dictionary is the tokenizer's own. Raises UserError that says what is missing.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder with dict.txt and the tokenizer's files")
    folder = path if path.is_dir() else path.parent
    dictionary = Dictionary.load(folder / "dict.txt") if (folder / "dict.txt").exists() else None
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, dictionary)
    models = sorted(folder.glob("*.model"))
    if len(models) > 1:
        raise UserError(
            f"{folder} has several SentencePiece models ({', '.join(m.name for m in models)}); name the file that is "
            "meant"
        )
    if models:
        return SentencePieceTokenizer(models[0], dictionary)
    if (folder / "encoder.json").exists() or (folder / "vocab.bpe").exists():
        return GPT2Tokenizer(folder, dictionary)
    if (folder / "tokenizer.json").exists():
        return HuggingFaceTokenizer(folder / "tokenizer.json", dictionary)
    raise UserError(
        f"{folder} holds no tokenizer: copy there the files that the model's data was made with (dict.txt, and "
        "sentencepiece.model or encoder.json and vocab.bpe), or name their folder with ",
        arg("tokenizer"),
    )


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether :func:`load_tokenizer` would find a tokenizer's files in a folder."""
    folder = Path(folder)
    return any(folder.glob("*.model")) or any(
        (folder / name).exists() for name in ("encoder.json", "vocab.bpe", "tokenizer.json")
    )


def _one_line(piece: str) -> str:
    return piece.replace("\n", "<newline>").replace("\r", "<return>")


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where it is printable Latin-1, else the next code point from 256
    on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

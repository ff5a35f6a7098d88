"""Demonstrations and queries as prompts, and prompts as requests for log-probabilities (:mod:`.engine`)."""

from __future__ import annotations

import functools
import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from momentum_lm.errors import UserError, arg
from momentum_lm.icl.datasets.loading import Example
from momentum_lm.lm.protocol import LanguageModel

from .engine import Request, common_length, shared_length

_AT_ONCE = 256  # queries whose whole prompts are held as text and tokens at a time


@dataclass(frozen=True)
class PromptFormat:
    """``bos`` begins every prompt; ``separator`` stands after every demonstration: token ids, or text."""

    bos: tuple[int, ...]
    separator: str | tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """``queries[i][c]`` asks for choice c of example i after the demonstrations, of which ``shots`` fitted."""

    queries: list[list[Request]]
    shots: int

    @functools.cached_property
    def shared(self) -> int:
        """The number of tokens that all prompts begin with."""
        return shared_length(self.queries)

    def longest(self) -> tuple[int, int]:
        """(tokens of the longest prompt, its query)."""
        return max((len(request.tokens), i) for i, query in enumerate(self.queries) for request in query)

    def sha256(self, whole: bool = False) -> str:
        """Digest of all token ids, those that all prompts begin with once, or (``whole``) with each prompt: equal ones
        ask models the same."""
        shared = 0 if whole else self.shared
        digest = hashlib.sha256(self.queries[0][0].context[:shared].tobytes())
        for query in self.queries:
            for request in query:
                own = request.tokens[shared:]
                digest.update(b"%d,%d;" % (len(request.context) - shared, len(own)))
                digest.update(own.tobytes())
        return digest.hexdigest()


def special_notes(lm: LanguageModel, form: PromptFormat, template: str, examples: Sequence[Example]) -> Iterator[str]:
    """What is to be told of names of special tokens, a line each: in the template or separator, where the token may be
    meant and the text is what the model gets; and in the examples' texts, where the text is meant and a tokenizer may
    give the token."""
    special: Mapping[str, int] = getattr(lm, "special_tokens", {})
    if not special:
        return
    names = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    separator = form.separator if isinstance(form.separator, str) else ""
    for what, text in (("the template", template), ("the separator", separator)):
        if found := names.search(text):
            yield f"{what} spells {found[0]}, which is ordinary text to the model, not the special token"
    texts = ["".join(example.pair(choice)) for example in examples for choice in range(len(example.inputs))]
    texts = [text for text in texts if names.search(text)]
    wrong = sum(
        not {special[name] for name in names.findall(text)}.isdisjoint(ids)
        for text, ids in zip(texts, lm.encode(texts), strict=True)
    )
    if wrong:
        yield (
            f"{wrong:,} texts spell a special token, which the tokenizer of {lm.name} takes for the token "
            "itself; change the texts"
        )


def demonstration_text(example: Example) -> str:
    """An example with its label."""
    return "".join(example.pair(example.gold))


def fit(lm: LanguageModel, form: PromptFormat, demonstrations: Sequence[Example], longest_query: int) -> list[Example]:
    """The first demonstrations that leave room for the longest query in the model's context.

    The authors' rule: another one is added while context + demonstration + longest query, in tokens, stay below the
    model's maximum.
    """
    size = len(form.bos)
    separator = len(form.separator) if isinstance(form.separator, tuple) else len(lm.encode([form.separator])[0])
    for count, tokens in enumerate(lm.encode([demonstration_text(example) for example in demonstrations])):
        size += len(tokens) + separator
        if size + longest_query >= lm.max_positions:
            return list(demonstrations[:count])
    return list(demonstrations)


def longest_query(lm: LanguageModel, examples: Sequence[Example]) -> int:
    """Tokens of the longest query with its longest continuation."""
    longest = 0
    for some in _batched(examples):
        texts = ["".join(example.pair(choice)) for example in some for choice in range(len(example.continuations))]
        longest = max(longest, *map(len, lm.encode(texts)))
    return longest


def build(
    lm: LanguageModel, form: PromptFormat, demonstrations: Sequence[Example], examples: Sequence[Example]
) -> Prompts:
    """The prompts for ``examples`` after ``demonstrations``, which should fit (see :func:`fit`).

    Text between special tokens is encoded as a whole, as it would be in training: so the ids are those of the full text
    whatever the tokenizer does at its seams. A continuation's tokens are those in which a prompt with it differs from
    the prompt without. Where a tokenizer joins the end of an input and the beginning of one continuation into a token,
    all continuations of that input are scored from the same token on, so that what is compared are probabilities of
    alternatives. Raises UserError naming the example whose prompt is longer than the model's context or has no token to
    predict from.
    """
    head, text = list(form.bos), ""
    demos = [demonstration_text(example) for example in demonstrations]
    if isinstance(form.separator, str):
        text = "".join(demo + form.separator for demo in demos)
    else:
        for tokens in lm.encode(demos):
            head += [*tokens, *form.separator]

    queries: list[list[Request]] = []
    for some in _batched(examples):
        for example, encoded in zip(some, _encode(lm, text, some), strict=True):
            query: list[Request] = []
            for tokens, start in encoded:
                _check(lm, example, len(head) + len(tokens), len(head) + start)
                context = array("i", head + tokens[:start])
                if query and query[-1].context == context:
                    context = query[-1].context  # choices mostly share their input: it is held once
                query.append(Request(context, array("i", tokens[start:])))
            queries.append(query)
    return Prompts(queries, len(demonstrations))


def _encode(lm: LanguageModel, text: str, examples: Sequence[Example]) -> list[list[tuple[list[int], int]]]:
    """(tokens, where the continuation begins among them) of ``text`` with each example's choices."""
    texts: dict[str, int] = {}  # every text once: choices mostly share their input
    for example in examples:
        for choice in range(len(example.continuations)):
            given, continuation = example.pair(choice)
            texts.setdefault(text + given, len(texts))
            texts.setdefault(text + given + continuation, len(texts))
    tokens = lm.encode(list(texts))
    queries = []
    for example in examples:
        query = []
        starts: dict[str, int] = {}  # of each input; but for partial evaluation there is one
        for choice in range(len(example.continuations)):
            given, continuation = example.pair(choice)
            whole = tokens[texts[text + given + continuation]]
            start = common_length(tokens[texts[text + given]], whole)
            starts[given] = min(start, starts.get(given, start))
            query.append((whole, given))
        queries.append([(whole, starts[given]) for whole, given in query])
    return queries


def _check(lm: LanguageModel, example: Example, length: int, start: int) -> None:
    where = f"example {example.index}"
    if start == 0:
        raise UserError(
            f"{where} has no token before its continuation; give the template some text there, or (fairseq "
            "checkpoints) begin prompts with ",
            arg("bos"),
            " '</s>'",
        )
    if start == length:
        raise UserError(f"{where} has a continuation without tokens; fix its text in the data")
    if length > lm.max_positions:
        raise UserError(
            f"{where} has a prompt of {length} tokens, but {lm.name} takes {lm.max_positions}; shorten texts with ",
            arg("shorten"),
        )


def _batched(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), _AT_ONCE):
        yield examples[start : start + _AT_ONCE]

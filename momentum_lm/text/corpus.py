"""Any text to binarised data for fairseq: ``train.bin/.idx``, ``valid``, ``test``, ``dict.txt``, the tokenizer's files,
``prepare.json``.

Documents keep their boundaries: one item each, ``</s>`` at its end. Exact duplicates are dropped (the first stays), and
the split of a document follows from its content and the seed alone. The output does not depend on the number of
workers, nor on interruptions: work goes on in ``OUTPUT/.prepare``, where a saved state says how far the files there are
good, and is moved to ``OUTPUT`` when all of it is done.

Memory does not grow with the text: 2 MiB of it per worker is under way (or one document, of at most 8 MiB, which takes
350 MB while it is tokenised), in processes of 60 to 100 MB each. Before that, the tokenizer's sample takes 25 times its
size while SentencePiece trains. What does grow is about 110 bytes for every distinct document, to know it again. With 2
workers and 200 MB of text: under 400 MB in all.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momentum_lm.cpu import usable_cpus
from momentum_lm.errors import UserError, arg
from momentum_lm.files import write_json
from momentum_lm.text.dictionary import Dictionary
from momentum_lm.text.encoding import CHUNK, Chunk, DocumentStream, encode_in_order
from momentum_lm.text.indexed import IndexedDatasetWriter
from momentum_lm.text.selection import SPLITS, Sample, SplitSurvey, Splitter, share
from momentum_lm.text.sources import FileSource, Source, find_sources
from momentum_lm.text.tokenizer import (
    GPT2Tokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from momentum_lm.text.vocabulary import train_sentencepiece
from momentum_lm.text.workplace import (
    OUTPUTS,
    check_output,
    clear_away,
    complete,
    difference,
    publish,
    read_json,
    reserved,
    same_documents,
    same_settings,
    workplace,
)

_SAVE_EVERY = 2.0  # seconds: what a killed run loses at most, but for reading again


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how: the command's flags. ``valid`` and ``test`` are fractions ("0.01") or numbers of
    documents ("500").

    Of ``sentencepiece``, ``gpt2_bpe`` and ``hf_tokenizer`` at most one; without any, a SentencePiece model of
    ``vocab_size`` is trained on a sample of ``sample_mb`` MB of the training documents. A ``dict.txt`` beside a given
    tokenizer is kept: checkpoints need its ids.
    """

    sources: tuple[str, ...]
    output: str
    column: str = "text"
    document: str | None = None
    vocab_size: int = 8192
    sample_mb: int = 10
    sentencepiece: str | None = None
    gpt2_bpe: str | None = None
    hf_tokenizer: str | None = None
    valid: str = "0.01"
    test: str = "0.01"
    seed: int = 1
    max_documents: int | None = None

    def given_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that a flag names. Raises UserError if it is none."""
        for path, kind in (
            (self.sentencepiece, SentencePieceTokenizer),
            (self.gpt2_bpe, GPT2Tokenizer),
            (self.hf_tokenizer, HuggingFaceTokenizer),
        ):
            if path is not None:
                folder = Path(path) if Path(path).is_dir() else Path(path).parent
                beside = folder / "dict.txt"
                return kind(path, Dictionary.load(beside) if beside.exists() else None)
        return None


def prepare(
    config: PrepareConfig,
    workers: int | None = None,
    force: bool = False,
    progress: Callable[..., Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Prepares the data, or goes on where an interrupted call stopped, or finds it done. Returns the content of
    ``prepare.json``.

    ``workers`` is the number of processes (default: the CPUs this process may use); ``progress`` makes a bar, as
    ``tqdm.tqdm``; ``say`` gets one line per stage. ``force`` replaces data or unfinished work of other settings, once
    the new data is complete. Raises UserError for anything wrong with the input, and leaves what was in the output
    folder; OSError where the disk fails.
    """
    valid, test = share(config.valid, "valid"), share(config.test, "test")
    SplitSurvey(valid, test)  # refuses fractions that leave nothing
    output = Path(config.output)
    check_output(output)
    sources = find_sources(list(config.sources), config.column, config.document, exclude=output.resolve(), say=say)
    _tell_of_whole_files(config, sources, bool(valid or test), say)
    tokenizer = config.given_tokenizer()
    wanted, as_of = _recorded(config, sources, tokenizer), _as_of(sources)
    done = None if force else _finished(output, wanted)
    if done is not None and done.get("sources_as_of") == as_of:
        clear_away(output, wanted)
        say(f"{output} is already prepared with these settings")
        return done
    with reserved(output) as work:
        run = _Run(work, config, sources, progress, say)
        done = None if force else _finished(output, wanted)  # again: now nobody else is at work there
        if done is not None:
            _refuse_other_documents(output, done, run)
            done["sources_as_of"] = as_of
            write_json(output / "prepare.json", done)
            say(f"{output} is already prepared with these settings")
            return done
        if not force and (there := [n for n in OUTPUTS if (output / n).exists()]):
            unfinished = read_json(work / "prepare.json") or {}
            if not same_settings(unfinished.get("config"), wanted):
                problem = f"{output} holds {there[0]}, which this command did not make"
                raise UserError(f"{problem}; use another ", arg("output"), ", or ", arg(force=True), " to replace it")
        with workplace(work, wanted, as_of, force) as touched:
            only_to_move = (work / "prepare.json").exists()
            if not only_to_move:
                splitter = run.plan(tokenizer, touched)
                splits = [name for name, wanted_of in zip(SPLITS, (1, valid, test), strict=True) if wanted_of]
                state = run.encode(splitter, splits, workers)
                complete(work, wanted, as_of, state)
            made = publish(work, output)
        if only_to_move and touched:
            _refuse_other_documents(output, made, run)
        return made


def _refuse_other_documents(output: Path, made: dict[str, Any], run: _Run) -> None:
    """Reads the sources again. Raises UserError if they are not what the data there was made of."""
    if not same_documents(made, run.read_all("comparing")):
        changed = "with a source whose content has changed since"
        if "sources_as_of" not in made:
            changed = "by an earlier version, which kept no record of the sources' content"
        raise UserError(
            f"{output} was prepared {changed}; use another ",
            arg("output"),
            ", or ",
            arg(force=True),
            " to replace it",
        )


def _finished(output: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """``prepare.json`` of the data that is there. Raises UserError if it was made with other settings."""
    done = read_json(output / "prepare.json")
    if done is not None and not same_settings(done.get("config"), wanted):
        other = difference(done.get("config"), wanted)
        raise UserError(
            f"{output} was prepared with {other}; use another ",
            arg("output"),
            ", or ",
            arg(force=True),
            " to replace it",
        )
    return done


@dataclass
class _Run:
    """One run, from the settings to token files in ``work``."""

    work: Path
    config: PrepareConfig
    sources: list[Source]
    progress: Callable[..., Any] | None
    say: Callable[[str], None]
    planned_for: dict[str, Any] | None = None  # what all documents together were, where the plan depends on them

    def plan(self, tokenizer: Tokenizer | None, touched: bool) -> Splitter:
        """Settles where the splits lie and which tokenizer it is, reading all documents once for either that needs it.

        A plan that is there already is taken; but where the sources are ``touched``, it is checked that they hold what
        they held.
        """
        config, work = self.config, self.work
        if plan := read_json(work / "plan.json"):
            self.planned_for = plan.get("documents")
            if touched and self.planned_for:
                self._refuse_changed(self.read_all("comparing"))
            return Splitter(*plan["thresholds"])
        survey = SplitSurvey(share(config.valid, "valid"), share(config.test, "test"))
        if survey.wanted:
            self._plan_for(self.read_all("splitting", lambda digest, text: survey.add(digest)))
        splitter = survey.splitter()
        if tokenizer is None:
            sample = Sample(config.sample_mb * 10**6)

            def offer(digest: bytes, text: bytes) -> None:
                if SPLITS[splitter.split(digest)] == "train":
                    sample.add(digest, text)

            self._plan_for(self.read_all("sampling", offer))
            if not sample.size:
                raise UserError(
                    f"{', '.join(config.sources)}: no document to train on; check ",
                    arg("column"),
                    ", ",
                    arg("document"),
                    ", ",
                    arg("valid"),
                    " and ",
                    arg("test"),
                )
            self.say(
                f"training SentencePiece: {config.vocab_size} pieces on {sample.size / 1e6:.1f} MB, about "
                f"{sample.size / 1e6:.0f} s"
            )
            model = train_sentencepiece((text.decode() for text in sample.documents()), config.vocab_size)
            (work / "sentencepiece.model").write_bytes(model)
            tokenizer = SentencePieceTokenizer(work / "sentencepiece.model")
        else:
            for name, file in tokenizer.files.items():
                shutil.copyfile(file, work / name)
        tokenizer.dictionary.save(work / "dict.txt")
        write_json(work / "plan.json", {"thresholds": splitter.thresholds, "documents": self.planned_for})
        return splitter

    def encode(self, splitter: Splitter, splits: list[str], workers: int | None) -> dict[str, Any]:
        """Tokenises into ``.partial`` files, from the saved state on. Returns the final state, which is saved too."""
        state, resume = read_json(self.work / "state.json"), None
        if state is None:
            nothing = {"documents": 0, "tokens": 0, "bytes": 0, "unknown": 0}
            state = {"complete": False, "counts": {"read": 0}, "special_tokens": 0}
            state["splits"] = {split: nothing.copy() for split in splits}
        elif state["complete"]:
            return state
        else:
            resume = state["splits"]
            self.say(f"going on after document {state['counts']['read']:,}")
        vocab_size = load_tokenizer(self.work).vocab_size
        stream = DocumentStream(self.sources, self.config.seed, self.config.max_documents)
        chunks = _chunks(stream, splitter, state["counts"])
        with contextlib.ExitStack() as stack:
            writers = {}
            for split in splits:
                writers[split] = IndexedDatasetWriter(self.work / split, vocab_size, resume and _written(resume[split]))
                stack.callback(writers[split].close)
            bar = stack.enter_context(self._bar("tokenising"))
            saved_at = time.monotonic()
            for chunk, parts in encode_in_order(chunks, self.work, workers or usable_cpus()):
                for index, part in parts.items():
                    tally = state["splits"][SPLITS[index]]
                    writers[SPLITS[index]].add_many(part.ids, part.sizes)
                    added = {
                        "documents": len(part.sizes),
                        "tokens": len(part.ids),
                        "bytes": part.bytes,
                        "unknown": part.unknown,
                    }
                    tally.update({name: tally[name] + count for name, count in added.items()})
                    state["special_tokens"] = state.get("special_tokens", 0) + part.spelled
                bar.update(chunk.position - bar.n)
                if time.monotonic() - saved_at > _SAVE_EVERY:
                    self._save(state, writers, chunk.counts)
                    saved_at = time.monotonic()
            self._refuse_changed(stream.counts())
            self._refuse_empty(state["splits"])
            self._save(state | {"complete": True}, writers, stream.counts())
        return state | {"complete": True, "counts": stream.counts()}

    def _save(self, state: dict[str, Any], writers: dict[str, IndexedDatasetWriter], counts: dict[str, Any]) -> None:
        for writer in writers.values():
            writer.checkpoint()
        write_json(self.work / "state.json", state | {"counts": counts})

    def _refuse_empty(self, splits: dict[str, Any]) -> None:
        total = sum(split["documents"] for split in splits.values())
        for name, split in splits.items():
            if not split["documents"] and name == "train":
                raise UserError(
                    arg(valid=self.config.valid),
                    " and ",
                    arg(test=self.config.test),
                    f" leave none of {total} documents to train on",
                )
            if not split["documents"]:
                raise UserError(
                    f"--{name} {vars(self.config)[name]} leaves the {name} split empty, of {total} documents: give a "
                    "larger fraction, a "
                    "number of documents, or 0 for no such split"
                )

    def read_all(self, label: str, look: Callable[[bytes, bytes], None] = lambda digest, text: None) -> dict[str, Any]:
        """Reads all documents, which ``look`` gets with their digests. Returns ``DocumentStream.counts``."""
        stream = DocumentStream(self.sources, self.config.seed, self.config.max_documents)
        with self._bar(label) as bar:
            for number, (digest, text) in enumerate(stream):
                look(digest, text)
                if number % 256 == 0:
                    bar.update(stream.position() - bar.n)
        return stream.counts()

    def _plan_for(self, counts: dict[str, Any]) -> None:
        self._refuse_changed(counts)
        self.planned_for = counts

    def _refuse_changed(self, counts: dict[str, Any]) -> None:
        if self.planned_for is not None and counts != self.planned_for:
            raise UserError(_CHANGED)

    @contextlib.contextmanager
    def _bar(self, label: str) -> Iterator[Any]:
        if self.progress is None:
            yield _NoBar()
            return
        sizes = [source.size for source in self.sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        with self.progress(total=total, desc=label, unit="B", unit_scale=True) as bar:
            yield bar
            bar.update((total or bar.n) - bar.n)


class _NoBar:
    n = 0

    def update(self, n: int) -> None:
        """Shows nothing."""


def _written(tally: dict[str, int]) -> tuple[int, int]:
    return tally["documents"], tally["tokens"]


def _chunks(stream: DocumentStream, splitter: Splitter, saved: dict[str, Any]) -> Iterator[Chunk]:
    """The documents after the saved state, about CHUNK bytes at a time. Raises UserError if those before it are not
    what they were.
    """
    chunk, same = Chunk(), not saved["read"]
    for digest, text in stream:
        if stream.read <= saved["read"]:
            now = stream.counts() if stream.read == saved["read"] else {}
            same = all(now.get(name) == count for name, count in saved.items())  # an older state has fewer
            continue
        if not same:
            break
        chunk.documents.append((splitter.split(digest), text))
        chunk.size += len(text)
        if chunk.size >= CHUNK:
            chunk.position, chunk.counts = stream.position(), stream.counts()
            yield chunk
            chunk = Chunk()
    if same and chunk.documents:
        chunk.position, chunk.counts = stream.position(), stream.counts()
        yield chunk
    if not same and stream.read == saved["read"]:  # saved at the end, which duplicates may follow the last document to
        now = stream.counts()
        same = all(now.get(name) == count for name, count in saved.items())
    if not same:
        raise UserError(_CHANGED)


_CHANGED = "the sources have changed since this run began, so its work so far is dropped; run the command again"


def _tell_of_whole_files(
    config: PrepareConfig, sources: list[Source], splits: bool, say: Callable[[str], None]
) -> None:
    """Says that whole files are documents where that is hardly meant.

    Raises UserError for a single one that cannot be split.
    """
    whole = [s for s in sources if isinstance(s, FileSource) and s.document == "file"]
    if config.document is not None or not 0 < len(whole) <= _FEW:
        return
    how = (
        *(arg(document="line"), " makes each line one, ", arg(document="blank-line")),
        " what stands between blank lines",
    )
    if len(sources) > 1 or not splits:
        several = f"{len(whole)} text files are {len(whole)} documents"
        what = several if len(whole) > 1 else f"{whole[0].name} is one document"
        say(UserError(f"note: {what}; ", *how).line())
        return
    for _ in whole[0].documents():  # what is wrong with it is told first
        pass
    raise UserError(
        f"{whole[0].name} is one document, since a whole file is one, and leaves nothing to split: ",
        *how,
        "; or ",
        arg(valid="0"),
        " ",
        arg(test="0"),
        " trains on it alone",
    )


_FEW = 10  # text files that somebody names may well be meant to be more documents than files


def _as_of(sources: list[Source]) -> str:
    """Changes with the size or the times of any source."""
    lines = "\n".join(source.as_of() for source in sources)
    return hashlib.blake2b(lines.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _recorded(config: PrepareConfig, sources: list[Source], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The settings that the output depends on."""
    return {
        "sources": list(config.sources),
        "files": len(sources),
        "source_bytes": sum(s.size or 0 for s in sources),
        "column": config.column,
        "document": config.document,
        "tokenizer": tokenizer.sha256() if tokenizer else "trained",
        "vocab_size": None if tokenizer else config.vocab_size,
        "sample_mb": None if tokenizer else config.sample_mb,
        "valid": config.valid,
        "test": config.test,
        "seed": config.seed,
        "max_documents": config.max_documents,
    }

"""In-context classification: the accuracy of a model whose prompt shows labelled examples (the paper's Tables 1 and 7).

A *unit* is one dataset with one draw of demonstrations: number of shots, seed, order. Its queries are scored once,
batch by batch, into a journal, and every calibration is computed from those scores; what is finished is never scored
again. Zero shots leave nothing to draw: they are scored once and stand for every seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from momentum_lm.errors import UserError
from momentum_lm.files import file_stem
from momentum_lm.icl import calibration, engine
from momentum_lm.icl.datasets.loading import Example, LabelledDataset, by_name
from momentum_lm.icl.demonstrations import Separation, evaluation_subset, select, separate
from momentum_lm.icl.engine import Scores
from momentum_lm.icl.prompts import PromptFormat, Prompts, fit, longest_query, special_notes
from momentum_lm.lm.protocol import LanguageModel
from momentum_lm.results import identity
from momentum_lm.results.journal import Journal
from momentum_lm.results.predictions import KEY
from momentum_lm.results.processes import TIMEOUT, Processes
from momentum_lm.results.records import Predictions, Results, Samples, results_lock, say_finished
from momentum_lm.system import progress_bar

from .classification_summary import summary
from .tasks import CHOICE

TASK = "icl_classification"
CONTENT_FREE = ("N/A", "[MASK]", "")  # the three inputs of Zhao et al., arXiv 2102.09690
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How prompts are made and scored.

    ``protocol`` ``paper``: demonstrations and evaluated examples are drawn as by the authors' code. ``score``: ``mean``
    or ``sum`` of a continuation's log-probabilities. ``limit``: at most so many evaluated examples; with
    ``fresh_queries`` a sample of its own for each seed, so that the spread over seeds is that of demonstrations and
    queries. ``bos`` and ``separator`` None: the model's own. ``batch_tokens`` None: by the memory there is.
    """

    shots: tuple[int, ...] = (0, 4, 16)
    seeds: tuple[int, ...] = (1, 2, 3)
    orders: int = 1
    sampling: str = "random"
    protocol: str = "default"
    score: str = "mean"
    calibrations: tuple[str, ...] = ("none",)
    limit: int | None = None
    fresh_queries: bool = False
    bos: tuple[int, ...] | None = None
    separator: str | tuple[int, ...] | None = None
    batch_tokens: int | None = None
    padding_side: str = "right"

    def form(self, lm: LanguageModel) -> PromptFormat:
        """How prompts are put together for a model."""
        return PromptFormat(
            lm.bos if self.bos is None else self.bos, lm.separator if self.separator is None else self.separator
        )


@dataclass(frozen=True)
class Unit:
    """One draw of demonstrations for one dataset. ``queries``: the seed of the sample that is evaluated."""

    dataset: str
    shots: int
    seed: int
    order: int
    queries: int = 1

    @property
    def name(self) -> str:
        """Also the stem of its files."""
        return self._name(f"{self.shots}shot" + (f"-seed{self.seed}-order{self.order}" if self.shots else ""))

    @property
    def draw(self) -> str:
        """The name of its demonstrations, in any order."""
        return self._name(f"{self.shots}shot-seed{self.seed}")

    @property
    def domain(self) -> str:
        """The stem of the files of its queries' continuations after no query (:meth:`Questions.domain_prompts`)."""
        return self._name("domain")

    def _name(self, what: str) -> str:
        return f"{file_stem(self.dataset)}-{what}" + (f"-queries{self.queries}" if self.queries != 1 else "")


class Questions:
    """The queries of one dataset: the evaluated examples, after each unit's demonstrations. ``queries``: the seed
    of their sample. ``calibrated``: with inputs without content after the examples.

    Raises UserError, naming the dataset, where the data does not allow what the settings ask.
    """

    def __init__(
        self, lm: LanguageModel, dataset: LabelledDataset, settings: Settings, queries: int = 1, calibrated: bool = True
    ) -> None:
        self.lm, self.spec, self.train, self.settings = lm, dataset.spec, dataset.train, settings
        with self._named():
            self.separation = separation(dataset, settings, queries)
        self.examples, self.notes = self.separation.evaluated, [*dataset.notes, *self.separation.notes()]
        self.partial = any(len(example.inputs) > 1 for example in self.examples)
        self._drawn: dict[Unit, list[Example]] = {}
        self.content_free = []
        if self.spec.labels and calibrated:
            inputs = map(self.spec.content_free, CONTENT_FREE)
            self.content_free = [Example(-1, (text,), self.examples[0].continuations, 0) for text in inputs]

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest query with its continuation."""
        return longest_query(self.lm, [*self.examples, *self.content_free])

    @functools.cached_property
    def examples_sha256(self) -> str:
        """Digest of the evaluated examples' texts and labels, whatever model they go to."""
        return identity.examples_sha256(self.examples)

    @property
    def size(self) -> int:
        """Queries of one unit."""
        return len(self.examples) + len(self.content_free)

    def draw(self, unit: Unit) -> list[Example]:
        """The unit's demonstrations, whether they fit or not."""
        if unit not in self._drawn:
            settings = self.settings
            sampling = "random" if settings.protocol == "paper" else settings.sampling  # the authors' draw too
            labels = len(self.spec.labels) if self.spec.labels else None
            with self._named():
                self._drawn[unit] = select(
                    self.train, unit.shots, unit.seed, sampling, labels, unit.order, self.separation.hidden
                )
        return self._drawn[unit]

    def prompts(self, form: PromptFormat, unit: Unit) -> tuple[list[Example], Prompts]:
        """The demonstrations that fit, and the prompts of all examples and then of the content-free inputs."""
        drawn = self.draw(unit)
        with self._named():
            demonstrations = fit(self.lm, form, drawn, self.longest)
            return demonstrations, CHOICE.requests(self.lm, form, demonstrations, [*self.examples, *self.content_free])

    def check(self, form: PromptFormat, unit: Unit) -> None:
        """Raises UserError for demonstrations that cannot be drawn and queries that do not fit: before anything is
        scored."""
        self.draw(unit)
        if len(form.bos) + self.longest > self.lm.max_positions:
            self.prompts(form, dataclasses.replace(unit, shots=0))  # raises, naming the example

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.spec.name}: ", error) from error

    def domain_prompts(self, form: PromptFormat) -> Prompts:
        """The same continuations after nothing but the end of the template (Holtzman et al., arXiv 2104.08315)."""
        examples = self.examples[:1] if self.spec.labels else self.examples
        premise = self.spec.domain_premise
        if not premise and not form.bos:  # something must come before the first token: what comes before any text
            premise = form.separator if isinstance(form.separator, str) else self.lm.decode(form.separator)
        return CHOICE.requests(
            self.lm, form, [], [Example(e.index, (premise,), e.continuations, e.gold) for e in examples]
        )

    def allows(self, name: str) -> bool:
        """Whether a calibration means anything here."""
        if name == "domain_pmi":
            return not self.partial
        return name == "none" or self.spec.labels is not None

    def warn(self) -> None:
        """Logs the notes on the data, a line each."""
        texts = [*self.examples, *self.train]
        special = special_notes(self.lm, self.settings.form(self.lm), self.spec.templates[self.spec.template], texts)
        for note in [*self.notes, *special]:
            _log.warning("%s: %s", self.spec.name, note)

    def warn_of_scores(self) -> None:
        """Logs labels that begin alike, and calibrations that are left out."""
        name = self.spec.name
        for one, other in self.colliding():
            _log.warning(
                "%s: the labels %r and %r begin with the same token; the tokens after it decide between them",
                name,
                one,
                other,
            )
        for left_out in (c for c in self.settings.calibrations if not self.allows(c)):
            reason = (
                "every choice has its own input" if left_out == "domain_pmi" else "every example has its own choices"
            )
            _log.warning("%s: no calibration %s, because %s", name, left_out, reason)

    def colliding(self) -> list[tuple[str, str]]:
        """Pairs of label words whose first tokens are the same."""
        labels = self.examples[0].continuations if self.spec.labels else ()
        first = [tokens[:1] for tokens in self.lm.encode(list(labels))]
        return [
            (labels[i].strip(), labels[j].strip())
            for i, j in itertools.combinations(range(len(labels)), 2)
            if first[i] == first[j]
        ]


def separation(dataset: LabelledDataset, settings: Settings, queries: int = 1) -> Separation:
    """What is evaluated of a data set, and which of its training examples are therefore not shown."""
    paper = settings.protocol == "paper"
    evaluated = evaluation_subset(dataset.evaluation, settings.limit, queries, protocol_paper=paper)
    return separate(dataset.train, evaluated, max(settings.shots), paper)


def _fewer(separation: Separation) -> dict[str, int]:
    """For a configuration: more shots, or some after none, may leave other examples to evaluate."""
    return {"not_evaluated": separation.left_out} if separation.left_out else {}


def units(datasets: Sequence[str], settings: Settings) -> Iterator[Unit]:
    """All units, those without demonstrations once for each sample of queries."""
    for dataset, shots in itertools.product(datasets, dict.fromkeys(settings.shots)):
        fresh, orders = settings.fresh_queries, range(settings.orders if shots else 1)
        seeds = dict.fromkeys(settings.seeds if shots or fresh else settings.seeds[:1])
        for seed, order in itertools.product(seeds, orders):
            yield Unit(dataset, shots, seed, order, seed if fresh else 1)


def evaluate(
    lm: LanguageModel,
    datasets: Sequence[LabelledDataset],
    settings: Settings,
    folder: str | os.PathLike[str],
    command: str | None = None,
    force: bool = False,
    show_progress: bool = True,
    timeout: float = TIMEOUT,
) -> bool:
    """Scores every unit that ``folder`` does not hold yet; writes results.json, predictions.jsonl and samples.json
    there.

    Under torchrun the processes share the batches and rank 0 writes; returns whether this process is that one. Raises
    UserError for prompts that do not fit, results of other settings in ``folder``, processes with other models, data or
    settings than rank 0 or without a sign of life for ``timeout`` seconds, files of the model that change meanwhile,
    and whatever the data or the model does not allow.
    """
    form = settings.form(lm)
    named = by_name(datasets)
    samples = dict.fromkeys(settings.seeds) if settings.fresh_queries else (1,)
    questions = {(name, seed): Questions(lm, data, settings, seed) for name, data in named.items() for seed in samples}
    with Processes(timeout) as processes, contextlib.ExitStack() as stack:
        agree(processes, lm, datasets, settings)
        recorder, todo = None, None
        if processes.first:
            stack.enter_context(results_lock(folder))
            config = configuration(lm, datasets, settings, form, command)
            recorder = _Recorder(Results(folder, TASK, lm.describe(), config, KEY, force, summary), settings, questions)
            todo = [unit for unit in units(list(named), settings) if recorder.lacks(unit)]
            if not todo and show_progress:
                say_finished(folder)
        todo = processes.from_first(todo) or []
        for unit in todo:
            questions[unit.dataset, unit.queries].check(form, unit)
            processes.alive()
        if processes.first and todo:
            for key in {unit.dataset: (unit.dataset, unit.queries) for unit in todo}.values():
                questions[key].warn()
                questions[key].warn_of_scores()
        total = sum(questions[unit.dataset, unit.queries].size for unit in todo)
        with progress_bar(total=total, unit="query", disable=not (todo and show_progress and processes.first)) as bar:
            scorer = _Scorer(lm, settings, os.path.join(folder, "scores"), processes, bar, force)
            for unit in todo:
                bar.set_description(unit.name)
                began = time.perf_counter()
                dataset_questions = questions[unit.dataset, unit.queries]
                demonstrations, prompts = dataset_questions.prompts(form, unit)
                if len(demonstrations) < unit.shots and processes.first:
                    _warn_fit(unit, len(demonstrations), lm)
                scores = scorer(prompts, unit.name)
                domain = None
                if "domain_pmi" in settings.calibrations and dataset_questions.allows("domain_pmi"):
                    domain = scorer(dataset_questions.domain_prompts(form), unit.domain, counted=False)
                if recorder is not None and scores is not None:
                    recorder.add(unit, demonstrations, prompts, scores, domain, time.perf_counter() - began)
        return processes.first


class _Scorer:
    """Scores prompts by way of a journal; the processes share the batches. Gives rank 0 the scores, the others None."""

    def __init__(
        self,
        lm: LanguageModel,
        settings: Settings,
        folder: str,
        processes: Processes,
        bar: Any,
        force: bool = False,
    ) -> None:
        self.lm, self.settings, self.folder = lm, settings, folder
        self.processes, self.bar, self.force = processes, bar, force

    def __call__(self, prompts: Prompts, name: str, counted: bool = True) -> Scores | None:
        """``counted``: whether the progress bar expects these queries."""
        lm, processes, begin = self.lm, self.processes, self.bar.n
        fingerprint = _fingerprint(lm, prompts)
        processes.agree(prompts=fingerprint)
        choices = [len(query) for query in prompts.queries]
        journal = Journal(self.folder, name, fingerprint, processes.rank, self.force)
        scores = journal.scores(choices) if processes.first else None
        if not processes.from_first(scores is not None):
            budget = self.settings.batch_tokens or journal.batch_tokens or engine.query_budget(lm, prompts.queries)
            batches = engine.plan(prompts.queries, processes.from_first(budget))
            journal.begin(processes.from_first(budget), [batch.queries for batch in batches], choices)
            mine = range(processes.rank, len(batches), processes.world)
            self.bar.update(sum(len(batches[number].queries) for number in journal.batches))
            left = [number for number in mine if number not in journal.batches]
            side = self.settings.padding_side
            for number, answers in engine.score_batches(lm, prompts.queries, batches, side, left):
                journal.add(number, engine.log_probs(answers))
                processes.alive()
                self.bar.update(len(answers) * processes.world)  # the others keep about the same pace
            lm.check_unchanged()  # what its pages said is the model's whose digest is recorded
            parts = processes.gather({number: journal.batches[number] for number in mine})
            if processes.first:
                scores = engine.collect(
                    prompts.queries, {q: sums for part in parts for batch in part.values() for q, sums in batch.items()}
                )
                journal.finish(scores)
        self.bar.n = begin + (len(prompts.queries) if counted else 0)
        self.bar.refresh()
        return scores if processes.first else None


class _Recorder:
    """Turns scores into runs, predictions and sample prompts on disk."""

    def __init__(self, results: Results, settings: Settings, questions: dict[tuple[str, int], Questions]) -> None:
        self.results, self.settings, self.questions = results, settings, questions
        self.predictions = Predictions(results)
        self.samples = Samples(results)

    def lacks(self, unit: Unit) -> bool:
        """Whether a unit has results to come."""
        return any(key not in self.predictions.runs for key in self._keys(unit))

    def add(
        self,
        unit: Unit,
        demonstrations: Sequence[Example],
        prompts: Prompts,
        scores: Scores,
        domain: Scores | None,
        seconds: float,
    ) -> None:
        """Records every calibration of a unit that is not there yet."""
        dataset_questions, kind = self.questions[unit.dataset, unit.queries], self.settings.score
        count = len(dataset_questions.examples)
        values = scores.values(kind)
        self._sample(unit, dataset_questions.examples[0], prompts)
        shared = {
            "shots_fitted": len(demonstrations),
            "demonstrations": [example.index for example in demonstrations],
            "prefix_tokens": prompts.shared,
            "prompts_sha256": prompts.sha256(),
            "examples_sha256": dataset_questions.examples_sha256,
            "demonstrations_sha256": identity.examples_sha256(demonstrations),
            "overlap": dataset_questions.separation.counts(),
            "seconds": round(seconds, 3),
        }
        for key in self._keys(unit):
            if key in self.predictions.runs:
                continue
            prior = None if domain is None else domain.values(kind)
            calibrated = calibration.apply(
                key[-1], values[:count], values[count:] if dataset_questions.spec.labels else None, prior
            )
            names = dict(zip(KEY, key, strict=True))
            about = names | {"setting": "in_context" if unit.shots else "zero_shot"}
            lines = CHOICE.predictions(dataset_questions.examples, calibrated)
            self.predictions.add(key, (about | line for line in lines))
            measured = CHOICE.measure(dataset_questions.spec, dataset_questions.examples, CHOICE.answers(calibrated))
            self.results.add({**names, **measured, **shared})

    def _keys(self, unit: Unit) -> list[tuple[Any, ...]]:
        """The runs that a unit gives: one for each calibration, and without demonstrations for each seed."""
        every = unit.shots == 0 and not self.settings.fresh_queries
        seeds = dict.fromkeys(self.settings.seeds) if every else [unit.seed]
        allows = self.questions[unit.dataset, unit.queries].allows
        names = [name for name in self.settings.calibrations if allows(name)]
        return [(unit.dataset, seed, unit.shots, unit.order, name) for seed in seeds for name in names]

    def _sample(self, unit: Unit, example: Example, prompts: Prompts) -> None:
        """Keeps the first prompt of each dataset and number of shots, for people to look at."""
        if (unit.dataset, unit.shots) in self.samples:
            return
        request = prompts.queries[0][example.gold]
        text = self.questions[unit.dataset, unit.queries].lm.decode(request.context)
        sample = {"dataset": unit.dataset, "shots": unit.shots, "seed": unit.seed, "prompt": text}
        self.samples.add({**sample, "continuations": list(example.continuations), "gold": example.gold})


def _fingerprint(lm: LanguageModel, prompts: Prompts) -> str:
    """Of everything that scores depend on."""
    return identity.digest([identity.REVISION, identity.of_model(lm), prompts.sha256()])


def agree(processes: Processes, lm: LanguageModel, datasets: Sequence[LabelledDataset], settings: Any) -> None:
    """Raises UserError, naming the process and what it is, where one has another model, data, settings or code than
    process 0."""
    if processes.world > 1:
        processes.agree(
            model=identity.digest(identity.of_model(lm)),
            data=identity.digest({data.spec.name: identity.dataset_sha256(data) for data in datasets}),
            flags=identity.digest(repr(settings)),
            code=identity.digest([identity.REVISION, identity.versions()]),
        )


def _warn_fit(unit: Unit, fitted: int, lm: LanguageModel) -> None:
    _log.warning(
        "%s: only %d of %d demonstrations fit in the model's %d tokens", unit.name, fitted, unit.shots, lm.max_positions
    )


def configuration(
    lm: LanguageModel, datasets: Sequence[LabelledDataset], settings: Settings, form: PromptFormat, command: str | None
) -> dict[str, Any]:
    """``config`` of a record: everything that scores depend on beside the model."""
    return {
        "protocol": settings.protocol,
        "sampling": "random" if settings.protocol == "paper" else settings.sampling,
        "score": settings.score,
        "limit": settings.limit,
        **({"fresh_queries": True} if settings.fresh_queries else {}),
        "bos": list(form.bos),
        "separator": form.separator,
        "dtype": identity.dtype(lm),
        "device": lm.device.type,
        "tokenizer": lm.tokenizer_sha256,
        "revision": identity.REVISION,
        "versions": identity.versions(),
        "datasets": {
            data.spec.name: {
                "labels": data.spec.labels,
                "template": data.spec.template,
                "source": data.source,
                "sha256": identity.dataset_sha256(data),
            }
            | _fewer(separation(data, settings))
            for data in datasets
        },
        "command": command,
    }

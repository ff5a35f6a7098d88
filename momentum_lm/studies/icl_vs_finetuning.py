"""Does a model learn in context as if it were finetuned? The comparison of arXiv 2212.10559, section 4, in the authors' form and corrected.

A *unit* is one dataset with one draw of demonstrations. Each of its batches of queries is asked zero-shot, in context and of every
finetuned model in turn; metrics are computed there and then, and nothing larger than a number per example, layer and head is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from momentum_lm.cpu import return_memory
from momentum_lm.errors import UserError
from momentum_lm.files import atomic_write, file_stem
from momentum_lm.icl import engine
from momentum_lm.icl.datasets.loading import Example, LabelledDataset, by_name
from momentum_lm.icl.demonstrations import identity as example_identity
from momentum_lm.icl.demonstrations import select
from momentum_lm.icl.engine import common_length, halving
from momentum_lm.icl.finetuning import Diverged, Lesson
from momentum_lm.icl.prompts import (
    PromptFormat,
    build,
    demonstration_text,
    fit,
    longest_query,
    special_notes,
)
from momentum_lm.lm.protocol import LanguageModel
from momentum_lm.lm.scoring import broken_weights
from momentum_lm.report.finetuning_summary import TASK, summary
from momentum_lm.results import identity
from momentum_lm.results.ownership import ARRAYS, check_ours
from momentum_lm.results.processes import TIMEOUT, Processes
from momentum_lm.results.records import Predictions, Results, results_lock, say_finished

from . import classification
from .findings import SETTINGS, Findings, record
from .finetuning_rate import Choice, choose
from .similarity import Rows, Student, measure
from .traces import Learned, Seen, TracedModel, align, demonstration_matrices, trace_queries
from .untrained import untrained

KEY = ("dataset", "seed", "shots")
DEFAULT_CONTROLS = ("untrained", "random", "shuffled_labels", "lcgd")
GRID = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
TRACE_BYTES = 64 << 20  # that a batch's traces may take
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is asked of a model. ``rates``: one learning rate, or a grid to choose from, on ``held_out`` training examples or, by
    ``questions.protocol`` ``paper``, on the evaluated ones. ``loss``: ``sequence`` or ``label``. ``parameters``: as of ``finetuned``.
    ``controls``: ``all_parameters`` is another; random updates are always among the results."""

    questions: classification.Settings = field(default_factory=classification.Settings)
    rates: tuple[float, ...] = GRID
    held_out: int = 100
    loss: str = "sequence"
    parameters: str = "kv"
    controls: tuple[str, ...] = DEFAULT_CONTROLS
    save_traces: bool = False


@dataclass(frozen=True)
class Unit:
    """One draw of demonstrations for one dataset."""

    dataset: str
    seed: int
    shots: int

    @property
    def name(self) -> str:
        """Also the stem of its files."""
        return f"{file_stem(self.dataset)}-{self.shots}shot-seed{self.seed}"


def analyse(
    lm: TracedModel,
    datasets: Sequence[LabelledDataset],
    settings: Settings,
    folder: str | os.PathLike[str],
    command: str | None = None,
    force: bool = False,
    show_progress: bool = True,
    timeout: float = TIMEOUT,
) -> bool:
    """Analyses every unit that ``folder`` does not hold yet; writes results.json and predictions.jsonl there.

    Under torchrun the processes share the batches and rank 0 writes; returns whether this process is that one. Raises
    UserError for zero shots, demonstrations of which none fits, results of other settings in ``folder``, learning rates
    that all diverge, processes as of :func:`momentum_lm.studies.classification.evaluate`, and whatever the data or the
    model does not allow. The model's weights are as before when it is over.
    """
    prompt_settings = settings.questions
    if 0 in prompt_settings.shots:
        raise UserError("--shots 0: without demonstrations there is nothing to compare; give numbers from 1 on")
    form, loaded = prompt_settings.form(lm), by_name(datasets)
    with Processes(timeout) as processes, contextlib.ExitStack() as stack:
        classification.agree(processes, lm, datasets, settings)
        draws = list(itertools.product(datasets, prompt_settings.shots, prompt_settings.seeds))
        units = [Unit(data.spec.name, seed, shots) for data, shots, seed in draws]
        todo: list[Unit] | None = None
        if processes.first:
            stack.enter_context(results_lock(folder))
            results = Results(folder, TASK, lm.describe(), _config(lm, datasets, settings, form, command), KEY, force, summary)
            predictions = Predictions(results, len(SETTINGS))
            todo = [unit for unit in dict.fromkeys(units) if (unit.dataset, unit.seed, unit.shots) not in predictions.runs]
            for unit in todo if settings.save_traces and not force else ():
                check_ours(_traces(folder, unit), ARRAYS)
            if not todo and show_progress:
                say_finished(folder)
        todo = processes.from_first(todo) or []
        if processes.first and todo:
            for name in dict.fromkeys(unit.dataset for unit in todo):
                data, separation = loaded[name], classification.separation(loaded[name], prompt_settings)
                template = data.spec.templates[data.spec.template]
                special = special_notes(lm, form, template, [*separation.evaluated, *data.train])
                for note in [*data.notes, *separation.notes(), *special]:
                    _log.warning("%s: %s", name, note)

        def analyse_one(unit: Unit) -> None:  # a function, so that nothing of one unit is held beside the next
            began = time.perf_counter()
            study = _Study(lm, loaded[unit.dataset], settings, form, unit, processes)
            rate = study.rate()
            findings = study.findings(lm, rate.rate, True)
            return_memory()
            baselines = {name: found for name, found in findings.items() if name != "finetuned"}
            if "untrained" in settings.controls:  # made anew each time: beside it only the model itself is held
                baselines["untrained"] = study.findings(untrained(lm), rate.rate, False).get("finetuned")
                return_memory()
            lm.check_unchanged()  # finetuning gives the model its own weights back, the pages of its file among them
            if processes.first:
                main = findings["finetuned"]
                assert main is not None
                run = record(main, baselines, study.examples, prompt_settings.score)
                if settings.save_traces:
                    save_traces(_traces(folder, unit), main, study.digest())
                about = study.about(rate) | {"seconds": round(time.perf_counter() - began, 3)}
                key = dict(zip(KEY, (unit.dataset, unit.seed, unit.shots), strict=True))
                predictions.add(tuple(key.values()),
                    ({**key, **line} for line in main.lines(study.examples, prompt_settings.score)))
                results.add({**key, **about, **run})

        for unit in tqdm(todo, unit="draw", disable=not (todo and show_progress and processes.first)):
            analyse_one(unit)
            return_memory()
        return processes.first


class _Study:
    """One unit: its demonstrations, its prompts in both settings, and what models make of them."""

    def __init__(
        self,
        lm: TracedModel,
        data: LabelledDataset,
        settings: Settings,
        form: PromptFormat,
        unit: Unit,
        processes: Processes,
    ) -> None:
        self.lm, self.data, self.settings, self.form, self.unit, self.processes = (
            lm,
            data,
            settings,
            form,
            unit,
            processes,
        )
        prompt_settings = settings.questions
        paper = prompt_settings.protocol == "paper"
        labels = len(data.spec.labels) if data.spec.labels else None
        try:
            self.separation = classification.separation(data, prompt_settings)
            self.examples, hidden = self.separation.evaluated, self.separation.hidden
            drawn = select(
                data.train,
                unit.shots,
                unit.seed,
                "random" if paper else prompt_settings.sampling,
                labels,
                hidden=hidden,
            )
            self.demonstrations = fit(lm, form, drawn, longest_query(lm, self.examples))
            if not self.demonstrations:
                raise UserError(
                    f"no demonstration fits beside the longest query in the {lm.max_positions} tokens of {lm.name}; "
                    "shorten texts with --max-field-tokens"
                )
            self.in_context = build(lm, form, self.demonstrations, self.examples)
            self.zero_shot = build(lm, form, [], self.examples)
        except UserError as error:
            raise UserError(f"{unit.dataset}: {error}") from error
        if len(self.demonstrations) < unit.shots and processes.first:
            _log.warning(
                "%s: only %d demonstrations fit; finetuning learns these too", unit.name, len(self.demonstrations)
            )
        self.tokens = lm.encode([demonstration_text(example) for example in self.demonstrations])
        self.lessons = self._lessons(self.demonstrations)
        self.aligned = align(self.whole(0), self.tokens, len(form.bos))
        if self.aligned is None and processes.first:
            _log.warning(
                "%s: the demonstrations have other tokens in the prompt than alone; no attention to them is compared",
                unit.name,
            )

    def digest(self) -> str:
        """Of the token ids of all prompts and of what is learned."""
        learned = [[lesson.start, list(lesson.tokens)] for lesson in self.lessons]
        return identity.digest([self.in_context.sha256(), self.zero_shot.sha256(whole=True), learned])

    def about(self, rate: Choice) -> dict[str, Any]:
        """What a record says of this unit beside what was found."""
        pairs = zip(self.demonstrations, self._shuffled(), strict=True)
        return {
            "labels_changed_by_shuffling": sum(one.gold != other.gold for one, other in pairs),
            "shots_fitted": len(self.demonstrations),
            "prompts_sha256": self.digest(),
            "examples_sha256": identity.examples_sha256(self.examples),
            "demonstrations_sha256": identity.examples_sha256(self.demonstrations),
            "overlap": self.separation.counts(),
            "demonstrations": [example.index for example in self.demonstrations],
            "demonstration_labels": [example.continuations[example.gold].strip() for example in self.demonstrations],
            "finetune_lr": rate.rate,
            "lr_selected_on": rate.selected_on,
            "lr_grid": rate.grid,
        }

    def rate(self) -> Choice:
        """The learning rate, chosen where there are several."""
        settings, prompt_settings = self.settings, self.settings.questions
        if prompt_settings.protocol == "paper":
            examples, source = self.examples, "evaluation"
        else:
            shown = {example_identity(example) for example in self.demonstrations}
            order = np.random.default_rng([self.unit.seed, 2]).permutation(len(self.data.train))
            free = (self.data.train[i] for i in order if i not in self.separation.hidden)
            rest = [example for example in free if example_identity(example) not in shown]
            examples, source = rest[: settings.held_out], "train"
        budget = prompt_settings.batch_tokens
        arguments = (settings.rates, settings.parameters, prompt_settings.score, budget, self.processes, self.unit.name)
        return choose(self.lm, self.form, self.lessons, examples, source, *arguments)

    def findings(self, lm: TracedModel, rate: float, controls: bool) -> dict[str, Findings | None]:
        """By the finetuned models' names: ``finetuned`` and, with ``controls``, those; None for one that diverges.

        Raises UserError where ``finetuned`` itself diverges and ``controls`` are asked for, that is for the model under study.
        """
        processes = self.processes
        students = self._students(lm, rate, controls)
        if "finetuned" not in students:
            return {}
        return_memory()
        look = _Look(self, lm, students, self.settings.save_traces and controls)
        batches = self._batches()
        for number in range(processes.rank, len(batches), processes.world):
            halving(look, batches[number])
            self.processes.alive()
            return_memory(collect=False)  # or what one batch leaves in the heap adds to the next one's
        return self._merged(lm, look.found, rate, students, controls)

    def _merged(
        self, lm: LanguageModel, found: dict[str, Findings], rate: float, students: dict[str, Student], controls: bool
    ) -> dict[str, Findings | None]:
        result: dict[str, Findings | None] = {}
        for name, part in found.items():
            others = self.processes.gather(part)
            if not self.processes.first:
                continue
            whole = Findings.join(others, students[name].learned.losses)
            for setting in ("zero_shot", "in_context"):
                if not whole.finite(setting):
                    raise broken_weights(lm)
            for setting, prompts in (
                ("zero_shot", self.zero_shot),
                ("in_context", self.in_context),
                ("finetuned", self.zero_shot),
            ):
                whole.scores[setting] = engine.collect(prompts.queries, whole.sums[setting])
            if whole.broken and name == "finetuned" and controls:
                raise UserError(
                    f"{self.unit.name}: the finetuned model is broken at learning rate {rate:g}; try a smaller "
                    "--finetune-lr"
                )
            result[name] = None if whole.broken else whole
        return result

    def _students(self, lm: TracedModel, rate: float, controls: bool) -> dict[str, Student]:
        chosen, students = self.settings.parameters, {}
        wanted: list[tuple[str, Sequence[Lesson], str, bool]] = [("finetuned", self.lessons, chosen, False)]
        if controls:
            shuffled = self._lessons(self._shuffled())
            known = {
                "shuffled_labels": (shuffled, chosen, False),
                "lcgd": (self.lessons, chosen, True),
                "all_parameters": (self.lessons, "all", False),
            }
            wanted += [(name, *what) for name, what in known.items() if name in self.settings.controls]
        for name, lessons, parameters, layerwise in wanted:
            same = [len(lesson.tokens) for lesson in lessons] == [len(lesson.tokens) for lesson in self.lessons]
            try:
                learned = Learned(
                    lm, lessons, rate, parameters, layerwise, keep_queries=same and self.aligned is not None
                )
            except Diverged as error:
                if name == "finetuned" and controls:
                    raise UserError(f"{self.unit.name}: {error}; try a smaller --finetune-lr") from error
                if self.processes.first:
                    _log.warning("%s: %s diverges (%s); going on without it", self.unit.name, name, error)
                continue
            self.processes.alive()
            students[name] = Student(name, learned, self.aligned if same else None, len(self.form.bos))
        return students

    def _shuffled(self) -> list[Example]:
        return shuffled(self.demonstrations, self.data.spec.labels is not None, self.unit.seed)

    def _lessons(self, demonstrations: Sequence[Example]) -> list[Lesson]:
        bos = list(self.form.bos)
        found = []
        texts = [
            text for example in demonstrations for text in (demonstration_text(example), example.pair(example.gold)[0])
        ]
        encoded = iter(self.lm.encode(texts))
        for whole, given in zip(encoded, encoded, strict=True):
            start = max(1, len(bos) + (0 if self.settings.loss == "sequence" else common_length(given, whole)))
            found.append(Lesson([*bos, *whole], start))
        return found

    def _batches(self) -> list[list[int]]:
        prompt_settings, config = self.settings.questions, self.lm.describe()["architecture"]
        longest = max(len(query[0].tokens) for query in self.zero_shot.queries)
        layers = next((int(config[name]) for name in ("layers", "num_hidden_layers", "n_layer") if name in config), 24)
        heads = next((int(config[name]) for name in ("heads", "num_attention_heads", "n_head") if name in config), 16)
        row = 2 * 4 * layers * heads * (self.in_context.shared + longest)
        most = engine.query_budget(self.lm, self.in_context.queries)
        budget = prompt_settings.batch_tokens or min(most, max(1, TRACE_BYTES // row) * longest)
        planned = engine.plan(self.zero_shot.queries, self.processes.from_first(budget), share=False)
        return [batch.queries for batch in planned]

    def whole(self, query: int) -> list[int]:
        """An example's prompt in context, with its first choice."""
        return list(self.in_context.queries[query][0].tokens)

    def rows(self, query: int) -> Rows:
        """The prompts of an example, token by token."""
        zero, context = self.zero_shot.queries[query][0], self.in_context.queries[query][0]
        starts = len(zero.context), len(context.context)
        return Rows(zero.tokens, context.tokens, *starts, len(self.form.bos))


class _Look:
    """Asks a model and its students about batches of examples, and keeps what the metrics make of it in ``found``. To look again at an
    example changes nothing."""

    def __init__(self, study: _Study, lm: TracedModel, students: dict[str, Student], keep_outputs: bool) -> None:
        self.study, self.lm, self.students, self.keep_outputs = study, lm, students, keep_outputs
        self.found = {name: Findings(len(study.examples)) for name in students}
        shared = study.in_context.queries[0][0].context[: study.in_context.shared]
        self.prefix = lm.start(shared) if shared else None
        self.matrices: tuple[Any, Any] | None = None

    def __call__(self, batch: Sequence[int]) -> None:
        study, lm, seed = self.study, self.lm, self.study.unit.seed
        zero_queries, icl_queries = ({i: p.queries[i] for i in batch} for p in (study.zero_shot, study.in_context))
        zero_shot = trace_queries(lm, zero_queries, projections=True, relax=True)
        icl = trace_queries(lm, icl_queries, study.in_context.shared, self.prefix, relax=True)
        if self.matrices is None and zero_shot.trace.keys:
            end = study.rows(0).query(1)[1].start
            heads = _key_heads(zero_shot)
            self.matrices = demonstration_matrices(lm, study.whole(0)[:end], len(study.form.bos), heads, [seed, 3])
        rows = [study.rows(query) for query in batch]
        for name, student in self.students.items():
            main, into = name == "finetuned", self.found[name]
            with student.learned.applied():
                ft = trace_queries(lm, zero_queries, relax=main)
            into.sums["zero_shot"] |= zero_shot.sums
            into.sums["in_context"] |= icl.sums
            into.sums["finetuned"] |= ft.sums
            if not all(np.isfinite(list(ft.sums[query])).all() for query in batch):
                into.broken = True
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                into.shares |= measure(
                    zero_shot, icl, ft, batch, rows, study.aligned, student, student.learned.update(lm.model), self.matrices, seed, main,
                    into.metrics,
                )  # fmt: skip
            if main and self.keep_outputs:
                for query, *outputs in zip(
                    batch, *(np.moveaxis(s.outputs, 1, 0) for s in (zero_shot, icl, ft)), strict=True
                ):
                    into.outputs[query] = np.stack(outputs).astype(np.float16)


def _key_heads(seen: Seen) -> int:
    """Key/value heads: what is as wide as the query heads, of the keys' width."""
    width = seen.trace.heads[0].shape[-1]
    return seen.trace.keys[0].shape[-1] // width


def shuffled(demonstrations: Sequence[Example], fixed: bool, seed: int) -> list[Example]:
    """The demonstrations with their labels dealt out anew, of which some may fall to where they were; where each has its own choices, one
    of the wrong ones instead."""
    draw = np.random.default_rng([seed, 1])
    if fixed:
        gold = [example.gold for example in demonstrations]
        labels = [gold[i] for i in draw.permutation(len(gold))]
    else:
        labels = [
            int((e.gold + draw.integers(1, max(2, len(e.continuations)))) % len(e.continuations))
            for e in demonstrations
        ]
    return [Example(e.index, e.inputs, e.continuations, label) for e, label in zip(demonstrations, labels, strict=True)]


def _traces(folder: str | os.PathLike[str], unit: Unit) -> Path:
    return Path(folder) / "traces" / f"{unit.name}.npz"


def save_traces(path: Path, findings: Findings, fingerprint: str = "") -> None:
    """Attention outputs (n, 3 settings, L, 2 positions, C) in half precision, and every metric by example."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        f"{part}/{name}": values for part, kept in findings.metrics.items() for name, values in kept.arrays.items()
    }
    with atomic_write(path, "wb") as file:
        np.savez_compressed(
            file,
            fingerprint=np.array(fingerprint),
            outputs=np.stack([findings.outputs[i] for i in sorted(findings.outputs)]),
            **arrays,
        )


def _config(
    lm: LanguageModel, datasets: Sequence[LabelledDataset], settings: Settings, form: PromptFormat, command: str | None
) -> dict[str, Any]:
    shared = classification.configuration(lm, datasets, settings.questions, form, command)
    return shared | {
        "finetune_lr": list(settings.rates),
        "finetune_loss": settings.loss,
        "finetune_parameters": settings.parameters,
        "held_out": settings.held_out,
        "controls": list(settings.controls),
    }

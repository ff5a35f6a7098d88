"""In-context learning against finetuning: the comparison of arXiv 2212.10559, section 4, in the authors' form and
corrected.

A *unit* is one dataset with one draw of demonstrations. Each batch of its queries goes through the model zero-shot and
in context, and through every finetuned model in turn; metrics are computed there and then, and nothing larger than a
number per example, layer and head is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from momentum_lm.cpu import return_memory
from momentum_lm.errors import UserError, arg
from momentum_lm.files import atomic_write
from momentum_lm.icl import engine
from momentum_lm.icl.datasets.loading import Example, LabelledDataset, by_name
from momentum_lm.icl.demonstrations import identity as example_identity
from momentum_lm.icl.engine import common_length, halving
from momentum_lm.icl.finetuning import Diverged, Lesson
from momentum_lm.icl.prompts import PromptFormat, demonstration_text
from momentum_lm.lm.anatomy import anatomy
from momentum_lm.lm.protocol import LanguageModel
from momentum_lm.lm.scoring import broken_weights
from momentum_lm.results import identity
from momentum_lm.results.ownership import ARRAYS, check_ours
from momentum_lm.results.processes import TIMEOUT, Processes
from momentum_lm.results.records import Predictions, Results, results_lock, say_finished
from momentum_lm.results.schema import RECORDS
from momentum_lm.system import progress_bar

from . import classification, controls
from .classification import Questions, Unit
from .controls import CONTROLS, Control
from .finetuning_rate import Choice, choose
from .finetuning_summary import summary
from .measurements import SETTINGS, Measurements, record
from .similarity import FinetunedModel, Rows, measure
from .traces import Learned, Seen, TracedModel, align, demonstration_matrices, trace_queries
from .untrained import untrained

TASK = "icl_finetune_analysis"
KEY = RECORDS[TASK].key
GRID = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
TRACE_BYTES = 64 << 20  # that a batch's traces may take
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How prompts are made and the model is finetuned. ``rates``: one learning rate, or a grid to choose from, on
    ``held_out`` training examples or, by ``questions.protocol`` ``paper``, on the evaluated ones. ``loss``:
    ``sequence`` or ``label``. ``parameters``: as of ``finetuned``. ``controls``: ``all_parameters`` is another; random
    updates are always among the results."""

    questions: classification.Settings = field(default_factory=classification.Settings)
    rates: tuple[float, ...] = GRID
    held_out: int = 100
    loss: str = "sequence"
    parameters: str = "kv"
    controls: tuple[str, ...] = controls.DEFAULT
    save_traces: bool = False


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
    UserError for zero shots, demonstrations of which none fits, rates that all diverge, and as ``evaluate`` does.
    """
    prompt_settings, score = settings.questions, settings.questions.score
    if 0 in prompt_settings.shots:
        raise UserError(arg(shots=0), ": without demonstrations there is nothing to compare; give numbers from 1 on")
    form, loaded = prompt_settings.form(lm), by_name(datasets)
    with Processes(timeout) as processes, contextlib.ExitStack() as stack:
        classification.agree(processes, lm, datasets, settings)
        todo: list[Unit] | None = None
        if processes.first:
            stack.enter_context(results_lock(folder))
            config = _config(lm, datasets, settings, form, command)
            results = Results(folder, TASK, lm.describe(), config, KEY, force, summary)
            predictions = Predictions(results, len(SETTINGS))
            units = classification.units(list(loaded), prompt_settings)
            todo = [unit for unit in units if _key(unit) not in predictions.runs]
            for unit in todo if settings.save_traces and not force else ():
                check_ours(_traces(folder, unit), ARRAYS)
            if not todo and show_progress:
                say_finished(folder)
        todo = processes.from_first(todo) or []
        names = dict.fromkeys(unit.dataset for unit in todo)
        questions = {name: Questions(lm, loaded[name], prompt_settings, calibrated=False) for name in names}
        for dataset_questions in questions.values() if processes.first else ():
            dataset_questions.warn()

        def analyse_one(unit: Unit) -> None:  # a function, so that nothing of one unit is held beside the next
            began = time.perf_counter()
            study = _Study(lm, questions[unit.dataset], settings, form, unit, processes)
            rate = study.rate()
            measured = study.with_controls(rate.rate)
            lm.check_unchanged()  # finetuning gives the model its own weights back, the pages of its file among them
            if processes.first:
                main = measured.pop("finetuned")
                assert main is not None
                if settings.save_traces:
                    save_traces(_traces(folder, unit), main, study.digest())
                run = study.about(rate) | {"seconds": round(time.perf_counter() - began, 3)}
                run |= record(main, measured, study.examples, score)
                named = dict(zip(KEY, _key(unit), strict=True))
                predictions.add(_key(unit), (named | line for line in main.lines(study.examples, score)))
                results.add(named | run)

        for unit in progress_bar(todo, unit="draw", disable=not (todo and show_progress and processes.first)):
            analyse_one(unit)
            return_memory()
        return processes.first


class _Study:
    """One unit: its demonstrations, its prompts in both settings, and the measurements of models on them."""

    def __init__(
        self,
        lm: TracedModel,
        questions: Questions,
        settings: Settings,
        form: PromptFormat,
        unit: Unit,
        processes: Processes,
    ) -> None:
        self.lm, self.questions, self.settings = lm, questions, settings
        self.form, self.unit, self.processes = form, unit, processes
        self.examples = questions.examples
        self.demonstrations, self.in_context = questions.prompts(form, unit)
        if not self.demonstrations:
            raise UserError(
                f"{unit.dataset}: no demonstration fits beside the longest query in the {lm.max_positions} tokens of "
                f"{lm.name}; shorten texts with ",
                arg("shorten"),
            )
        self.zero_shot = questions.prompts(form, dataclasses.replace(unit, shots=0))[1]
        if len(self.demonstrations) < unit.shots and processes.first:
            _log.warning(
                "%s: only %d demonstrations fit; finetuning learns these too", unit.draw, len(self.demonstrations)
            )
        self.tokens = lm.encode([demonstration_text(example) for example in self.demonstrations])
        self.lessons = self._lessons(self.demonstrations)
        self.aligned = align(self.whole(0), self.tokens, len(form.bos))
        if self.aligned is None and processes.first:
            _log.warning(
                "%s: the demonstrations have other tokens in the prompt than alone; no attention to them is compared",
                unit.draw,
            )

    def digest(self) -> str:
        """Of the token ids of all prompts and of what is learned."""
        learned = [[lesson.start, list(lesson.tokens)] for lesson in self.lessons]
        return identity.digest([self.in_context.sha256(), self.zero_shot.sha256(whole=True), learned])

    def about(self, rate: Choice) -> dict[str, Any]:
        """What a record says of this unit beside its measurements."""
        pairs = zip(self.demonstrations, self._shuffled(), strict=True)
        return {
            "labels_changed_by_shuffling": sum(one.gold != other.gold for one, other in pairs),
            "shots_fitted": len(self.demonstrations),
            "prompts_sha256": self.digest(),
            "examples_sha256": identity.examples_sha256(self.examples),
            "demonstrations_sha256": identity.examples_sha256(self.demonstrations),
            "overlap": self.questions.separation.counts(),
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
            train, hidden = self.questions.train, self.questions.separation.hidden
            shown = {example_identity(example) for example in self.demonstrations}
            order = np.random.default_rng([self.unit.seed, 2]).permutation(len(train))
            rest = [train[i] for i in order if i not in hidden and example_identity(train[i]) not in shown]
            examples, source = rest[: settings.held_out], "train"
        finetune = functools.partial(Learned, self.lm, self.lessons, parameters=settings.parameters)
        scoring_settings = (prompt_settings.score, prompt_settings.batch_tokens, self.processes, self.unit.draw)
        return choose(self.lm, self.form, examples, source, settings.rates, finetune, *scoring_settings)

    def with_controls(self, rate: float) -> dict[str, Any]:
        """The measurements of the model, and of its controls, by their names."""
        measured = self.measure(self.lm, rate, controls.beside(self.settings.controls))
        return_memory()
        if "untrained" in self.settings.controls:  # made anew each time: beside it only the model itself is held
            found = self.measure(untrained(self.lm), rate, {"untrained": CONTROLS["untrained"]})
            measured["untrained"] = found.get("untrained")
            return_memory()
        return measured

    def measure(self, lm: TracedModel, rate: float, models: Mapping[str, Control]) -> dict[str, Measurements | None]:
        """Finetunes ``models`` of ``lm`` and measures each: in rank 0 by their names; None for one that gives no finite
        probabilities, and without those that diverge.

        Raises UserError where a model that is required diverges.
        """
        processes = self.processes
        finetuned = self._finetuned(lm, rate, models)
        if not finetuned:
            return {}
        return_memory()
        passes = _Passes(self, lm, finetuned)
        batches = self._batches()
        for number in range(processes.rank, len(batches), processes.world):
            halving(passes, batches[number])
            self.processes.alive()
            return_memory(collect=False)  # or what one batch leaves in the heap adds to the next one's
        result: dict[str, Measurements | None] = {}
        for name, part in passes.measured.items():
            others = processes.gather(part)
            if processes.first:
                whole = self._joined(lm, others, finetuned[name].learned.losses)
                if whole.broken and models[name].required:
                    raise UserError(
                        f"{self.unit.draw}: the finetuned model is broken at learning rate {rate:g}; try a smaller ",
                        arg("rates"),
                    )
                result[name] = None if whole.broken else whole
        return result

    def _joined(self, lm: LanguageModel, parts: Sequence[Measurements], losses: list[float]) -> Measurements:
        """What all processes measured of one model. Raises UserError where the model itself is broken."""
        whole = Measurements.join(parts, losses)
        for setting in ("zero_shot", "in_context"):
            if not whole.finite(setting):
                raise broken_weights(lm)
        for setting in SETTINGS:
            prompts = self.in_context if setting == "in_context" else self.zero_shot
            whole.scores[setting] = engine.collect(prompts.queries, whole.sums[setting])
        return whole

    def _finetuned(self, lm: TracedModel, rate: float, models: Mapping[str, Control]) -> dict[str, FinetunedModel]:
        found = {}
        for name, control in models.items():
            lessons = self._lessons(self._shuffled()) if control.shuffled else self.lessons
            same = [len(lesson.tokens) for lesson in lessons] == [len(lesson.tokens) for lesson in self.lessons]
            parameters, aligned = control.parameters or self.settings.parameters, self.aligned if same else None
            try:
                learned = Learned(lm, lessons, rate, parameters, control.layerwise, keep_queries=aligned is not None)
            except Diverged as error:
                if control.required:
                    raise UserError(f"{self.unit.draw}: {error}; try a smaller ", arg("rates")) from error
                if self.processes.first:
                    _log.warning("%s: %s diverges (%s); going on without it", self.unit.draw, name, error)
                if control.own_controls:
                    return {}
                continue
            self.processes.alive()
            found[name] = FinetunedModel(control, learned, aligned, len(self.form.bos))
        return found

    def _shuffled(self) -> list[Example]:
        return shuffled(self.demonstrations, self.questions.spec.labels is not None, self.unit.seed)

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
        prompt_settings, parts = self.settings.questions, anatomy(self.lm.model)
        longest = max(len(query[0].tokens) for query in self.zero_shot.queries)
        row = 2 * 4 * max(1, len(parts.layers)) * (parts.heads or 1) * (self.in_context.shared + longest)
        most = engine.query_budget(self.lm, self.in_context.queries)
        budget = prompt_settings.batch_tokens or min(most, max(1, TRACE_BYTES // row) * longest)
        planned = engine.plan(self.zero_shot.queries, self.processes.from_first(budget), share=False)
        return [list(batch.queries) for batch in planned]

    def whole(self, query: int) -> list[int]:
        """An example's prompt in context, with its first choice."""
        return list(self.in_context.queries[query][0].tokens)

    def rows(self, query: int) -> Rows:
        """The prompts of an example, token by token."""
        zero, context = self.zero_shot.queries[query][0], self.in_context.queries[query][0]
        starts = len(zero.context), len(context.context)
        return Rows(zero.tokens, context.tokens, *starts, len(self.form.bos))


class _Passes:
    """The forward passes of one batch of examples through a model and its finetuned versions, and what the metrics make
    of them in ``measured``. To repeat a batch changes nothing."""

    def __init__(self, study: _Study, lm: TracedModel, finetuned: dict[str, FinetunedModel]) -> None:
        self.study, self.lm, self.finetuned = study, lm, finetuned
        self.measured = {name: Measurements(len(study.examples)) for name in finetuned}
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
        for name, model in self.finetuned.items():
            into = self.measured[name]
            with model.learned.applied():
                ft = trace_queries(lm, zero_queries, relax=model.control.own_controls)
            into.sums["zero_shot"] |= zero_shot.sums
            into.sums["in_context"] |= icl.sums
            into.sums["finetuned"] |= ft.sums
            if not all(np.isfinite(list(ft.sums[query])).all() for query in batch):
                into.broken = True
                continue
            update = model.learned.update(lm.model)
            with np.errstate(over="ignore", invalid="ignore"):
                into.shares |= measure(
                    zero_shot, icl, ft, batch, rows, study.aligned, model, update, self.matrices, seed, into.metrics
                )
            if model.control.required and study.settings.save_traces:
                outputs = np.stack([np.moveaxis(seen.outputs, 1, 0) for seen in (zero_shot, icl, ft)], axis=1)
                into.outputs |= zip(batch, outputs.astype(np.float16), strict=True)


def _key_heads(seen: Seen) -> int:
    """Key/value heads: what is as wide as the query heads, of the keys' width."""
    width = seen.trace.heads[0].shape[-1]
    return seen.trace.keys[0].shape[-1] // width


def shuffled(demonstrations: Sequence[Example], fixed: bool, seed: int) -> list[Example]:
    """The demonstrations with their labels dealt out anew, of which some may fall to where they were; where each has
    its own choices, one of the wrong ones instead."""
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


def _key(unit: Unit) -> tuple[Any, ...]:
    return unit.dataset, unit.seed, unit.shots


def _traces(folder: str | os.PathLike[str], unit: Unit) -> Path:
    return Path(folder) / "traces" / f"{unit.draw}.npz"


def save_traces(path: Path, measured: Measurements, fingerprint: str = "") -> None:
    """Attention outputs (n, 3 settings, L, 2 positions, C) in half precision, and every metric by example."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"fingerprint": np.array(fingerprint)}  # first: it is the mark that the file is ours
    arrays["outputs"] = np.stack([measured.outputs[i] for i in sorted(measured.outputs)])
    for part, kept in measured.metrics.items():
        arrays |= {f"{part}/{name}": values for name, values in kept.arrays.items()}
    with atomic_write(path, "wb") as file:
        np.savez_compressed(file, **arrays)


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

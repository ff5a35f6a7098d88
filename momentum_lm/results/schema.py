"""What the files of a results folder hold, as types, and one validator that checks a value read from JSON against them.

Files come from other people, other versions and full disks: nothing is used before it is what its type says. Keys that
a type does not name may be there and are left alone, so that a later version may add some.
"""

# no `from __future__ import annotations`: TypedDict would not see NotRequired
import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

_DEPTH = 12  # of every type below


@dataclass(frozen=True)
class Bounds:
    """Of a number."""

    low: float
    high: float

    def problem(self, value: float) -> str:
        return (
            "" if self.low <= value <= self.high else f"is {_brief(value)}, and not from {self.low:g} to {self.high:g}"
        )


@dataclass(frozen=True)
class Length:
    """Of a list or a text."""

    least: int
    most: int

    def problem(self, value: Sequence[Any]) -> str:
        if self.least <= len(value) <= self.most:
            return ""
        right = f"{self.least}" if self.least == self.most else f"from {self.least} to {self.most:,}"
        return f"has a length of {len(value):,}, and not {right}"


@dataclass(frozen=True)
class Inside:
    """Of a path: it stays below this folder."""

    folder: str

    def problem(self, value: str) -> str:
        parts = value.split("/")
        fine = len(parts) > 1 and parts[0] == self.folder and not {"", ".", ".."} & set(parts) and "\0" not in value
        return "" if fine else f"is {_brief(value)}, and no file of {self.folder}/"


Real = Annotated[float, Bounds(-1e12, 1e12)]
Positive = Annotated[float, Bounds(0, 1e305)]  # the perplexity of a broken model is far above anything else
Share = Annotated[float, Bounds(0, 1)]
Count = Annotated[int, Bounds(0, 2**53)]
Some = Annotated[int, Bounds(1, 2**53)]
Small = Annotated[int, Bounds(0, 2**31 - 1)]
Name = Annotated[str, Length(1, 4096)]
Text = Annotated[str, Length(0, 1 << 24)]
Digest = Annotated[str, Length(0, 128)]
Shares = Annotated[list[Share], Length(2, 2)]  # an interval
Ends = Annotated[list[Positive], Length(2, 2)]
Layers = list[Real | None]  # one value a layer
Known = Annotated[list[Real], Length(2, 2)]  # an interval without gaps
Interval = Annotated[list[Real | None], Length(2, 2)]
Table = list[list[Real | None]]
Cells = Annotated[list[Annotated[list[Annotated[list[Count], Length(2, 2)]], Length(2, 2)]], Length(2, 2)]


class Model(TypedDict):
    """Which model. ``path`` is for the reader; the rest tells it from others."""

    path: Text
    sha256: NotRequired[Digest]
    parameters: NotRequired[Count]
    architecture: NotRequired[dict[str, Any]]


class DatasetConfig(TypedDict):
    """Of one labelled data set. ``sha256`` is of its texts, labels and templates."""

    labels: list[Text] | None
    template: NotRequired[Text]
    source: NotRequired[dict[str, Any]]
    sha256: NotRequired[Digest]


class Data(TypedDict):
    """Binarised text."""

    path: NotRequired[Text]
    dictionary_sha256: NotRequired[Digest]


class Config(TypedDict):
    """Settings of a study. Its own entries are compared, and otherwise only shown."""

    data: NotRequired[Data]
    dtype: NotRequired[Text]
    command: NotRequired[Text | None]
    revision: NotRequired[Count]


class ClassificationConfig(Config):
    datasets: dict[str, DatasetConfig]


class AnalysisConfig(Config):
    datasets: NotRequired[dict[str, DatasetConfig]]


class PositionLoss(TypedDict):
    """Of the part of a block that ends at the place ``end``, in nats a token."""

    end: Some
    loss: Positive
    ci95: Known | None
    blocks: Some


class IclScore(TypedDict):
    """Loss around the 500th token of a block less that around the 50th, in nats."""

    score: Real
    ci95: Known | None
    blocks: Some


class PerplexityRun(TypedDict):
    """One split at one context length."""

    split: Name
    context_length: Some
    perplexity: Positive
    ci95: Ends | None
    bits_per_byte: Positive | None
    num_tokens: Some
    num_documents: Count
    data_sha256: Digest
    documents: Annotated[str, Inside("documents")]
    by_position: NotRequired[list[PositionLoss]]
    icl_score: NotRequired[IclScore | None]
    dictionary_sha256: NotRequired[Digest]
    digest: NotRequired[Digest]


class ClassificationRun(TypedDict):
    """One data set with one draw of demonstrations and one calibration."""

    dataset: Name
    seed: Count
    shots: Small
    order: Small
    calibration: Name
    shots_fitted: Small
    num_examples: Some
    accuracy: Share
    ci95: Shares
    macro_f1: Share | None
    majority: Share | None
    confusion: list[list[Count]] | None
    chance: NotRequired[Share]
    demonstrations: NotRequired[list[Count]]
    prefix_tokens: NotRequired[Count]
    seconds: NotRequired[Positive]
    prompts_sha256: NotRequired[Digest]
    examples_sha256: NotRequired[Digest]
    demonstrations_sha256: NotRequired[Digest]
    overlap: NotRequired[dict[str, Count]]
    digest: NotRequired[Digest]


class Accuracies(TypedDict):
    zero_shot: Share
    in_context: Share
    finetuned: Share


class RepairCounts(TypedDict):
    cells: Cells


class Attention(TypedDict):
    index: Count
    in_context: list[list[Share]]
    finetuned: list[list[Share]]


class Baseline(TypedDict):
    accuracy: NotRequired[dict[str, Share]]
    paper: NotRequired[dict[str, Layers]]
    corrected: NotRequired[dict[str, Layers]]
    paper_ci95: NotRequired[dict[str, list[Interval | None]]]
    corrected_ci95: NotRequired[dict[str, list[Interval | None]]]


class AnalysisRun(TypedDict):
    """One data set with one draw of demonstrations: ICL against finetuning."""

    dataset: Name
    seed: Count
    shots: Small
    num_examples: Some
    finetune_lr: Annotated[float, Bounds(1e-30, 1e12)]
    accuracy: Accuracies
    rec2ftp_counts: RepairCounts
    paper: dict[str, Layers]
    corrected: dict[str, Layers]
    paper_ci95: NotRequired[dict[str, list[Interval | None]]]
    corrected_ci95: NotRequired[dict[str, list[Interval | None]]]
    baselines: dict[str, Baseline | None] | None
    rec2ftp: NotRequired[Share | None]
    heads: NotRequired[dict[str, Table] | None]
    attention: NotRequired[list[Attention]]
    demonstrations: NotRequired[list[Count]]
    demonstration_labels: NotRequired[list[Text]]
    examples_sha256: NotRequired[Digest]
    demonstrations_sha256: NotRequired[Digest]
    overlap: NotRequired[dict[str, Count]]
    digest: NotRequired[Digest]


class Sample(TypedDict):
    """A prompt as the model saw it, kept for people to look at."""

    dataset: Name
    shots: Small
    seed: NotRequired[Count]
    prompt: Text
    continuations: Annotated[list[Text], Length(1, 100_000)]
    gold: Small


class Prediction(TypedDict):
    """A line of ``predictions.jsonl``: what was answered about one example."""

    dataset: Name
    seed: Count
    shots: Small
    order: NotRequired[Small]
    calibration: NotRequired[Name]
    setting: NotRequired[Name]
    index: Count
    gold: Small
    pred: Small
    scores: NotRequired[list[Real]]


class JournalHead(TypedDict):
    """The first line of a journal."""

    fingerprint: Digest
    batch_tokens: Some


class JournalBatch(TypedDict):
    """A finished batch: the summed log-probability of each choice, by the query's number."""

    batch: Small
    sums: dict[str, list[Real]]


@dataclass(frozen=True)
class Record:
    """What a study records: the entries that tell a run from the others in a folder, and the types of runs and
    configuration."""

    key: tuple[str, ...]
    run: Any
    config: Any


RECORDS = {
    "lm_perplexity": Record(("split", "context_length"), PerplexityRun, Config),
    "icl_classification": Record(
        ("dataset", "seed", "shots", "order", "calibration"), ClassificationRun, ClassificationConfig
    ),
    "icl_finetune_analysis": Record(("dataset", "seed", "shots"), AnalysisRun, AnalysisConfig),
}


def results_problem(data: dict[str, Any]) -> str:
    """What is wrong with the content of a ``results.json``, in words; empty if nothing. Of a task that is not known,
    only its outline."""
    for name, expected in (("task", str), ("model", dict), ("config", dict), ("runs", list)):
        if found := problem(data[name], expected, name):
            return found
    task = data["task"]
    if task not in RECORDS or not data["runs"]:  # nothing of it is used
        return ""
    runs = [(run, f"run {number}") for number, run in enumerate(data["runs"])]
    checks = [(run, RECORDS[task].run, "", of) for run, of in runs]
    checks += [(data["model"], Model, "model", ""), (data["config"], RECORDS[task].config, "config", "")]
    found = next((text for check in checks if (text := problem(*check))), "")
    found = found or next((text for run, of in runs if (text := _within(task, data, run, of))), "")
    return found or (_depths(data["runs"]) if task == "icl_finetune_analysis" else "")


def problem(value: Any, shape: Any, where: str, of: str = "", depth: int = 0) -> str:
    """What is not as a type says, in words, such as ``run 0: accuracy is a str``; empty if nothing.

    ``shape``: a TypedDict of this module, ``list[X]``, ``dict[str, X]``, ``X | None``, ``Annotated[X, Bounds(...)]``,
    ``Literal``, int, float, str, bool, dict, list or Any. An int is a float, and a bool neither. ``where`` names the
    value, ``of`` what it is part of.
    """
    if shape is Any:
        return ""
    origin, arguments = get_origin(shape), get_args(shape)
    if origin is Annotated:
        found = problem(value, arguments[0], where, of, depth)
        text = "" if found else next((text for limit in arguments[1:] if (text := limit.problem(value))), "")
        return found or (_said(where, of, text) if text else "")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return ""
        return problem(value, next(part for part in arguments if part is not type(None)), where, of, depth)
    if origin is Literal:
        if value in arguments:
            return ""
        return _said(where, of, f"is {_brief(value)}, and none of {', '.join(map(str, arguments))}")
    if depth > _DEPTH:
        return _said(where, of, "is nested too deeply")
    if is_typeddict(shape):
        if not isinstance(value, dict):
            return _said(where, of, f"is a {type(value).__name__}")
        for name, (part, needed) in _fields(shape).items():
            if name in value:
                if found := problem(value[name], part, f"{where}.{name}" if where else name, of, depth + 1):
                    return found
            elif needed:
                return _said(where, of, f"has no {name}")
        return ""
    if not _is(value, origin or shape):
        return _said(where, of, f"is a {type(value).__name__}")
    if origin is dict:
        parts = ((f"{where}.{name}", part) for name, part in value.items())
        return next((found for name, part in parts if (found := problem(part, arguments[1], name, of, depth + 1))), "")
    if origin is list:
        return next((found for part in value if (found := problem(part, arguments[0], where, of, depth + 1))), "")
    return ""


@functools.cache
def _fields(shape: Any) -> dict[str, tuple[Any, bool]]:
    """{key: (type, whether it must be there)} of a TypedDict."""
    hints = get_type_hints(shape, include_extras=True)
    return {
        n: (get_args(h)[0] if get_origin(h) is NotRequired else h, n in shape.__required_keys__)
        for n, h in hints.items()
    }


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _within(task: str, data: dict[str, Any], run: dict[str, Any], of: str) -> str:
    """What a run's values say against each other."""
    if task == "icl_classification":
        about = data["config"]["datasets"].get(run["dataset"])
        if about is None:
            return _said("dataset", of, f"is {_brief(run['dataset'])}, which config.datasets lacks")
        if run["majority"] is None and "chance" not in run:
            return f"{of} has neither majority nor chance"
        size = len(about["labels"] or ())
        square = run["confusion"] is None or (
            len(run["confusion"]) == size and all(len(row) == size for row in run["confusion"])
        )
        return "" if square else _said("confusion", of, f"is no table of {size} by {size} labels")
    if task == "icl_finetune_analysis":
        for name, table in [*(run.get("heads") or {}).items(), *_shares(run)]:
            if not table or not table[0] or len({len(row) for row in table}) > 1:
                return _said(f"table {name}", of, "has rows of unequal length")
        if any(len(entry["in_context"]) != len(entry["finetuned"]) for entry in run.get("attention", ())):
            return _said("attention", of, "has tables of unequal size")
    return ""


def _shares(run: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (f"attention.{name}", entry[name]) for entry in run.get("attention", ()) for name in ("in_context", "finetuned")
    ]


def _depths(runs: Sequence[dict[str, Any]]) -> str:
    """All values by layer of one setting have as many layers: the model's."""
    layers: dict[tuple[Any, Any], int] = {}
    heads: dict[tuple[Any, Any, str], tuple[int, int]] = {}
    for number, run in enumerate(runs):
        setting = run["dataset"], run["shots"]
        groups: list[Any] = [run, *[part for part in (run["baselines"] or {}).values() if part is not None]]
        for group in groups:
            for part in ("paper", "corrected", "paper_ci95", "corrected_ci95"):
                for name, values in group.get(part, {}).items():
                    if not values or layers.setdefault(setting, len(values)) != len(values):
                        return f"run {number}: {part}.{name} has {len(values)} layers, and others {layers.get(setting)}"
        for name, table in (run.get("heads") or {}).items():
            size = len(table), len(table[0])
            if heads.setdefault((*setting, name), size) != size:
                return f"run {number}: heads.{name} has another size than in the runs before"
    return ""


def _said(where: str, of: str, what: str) -> str:
    return f"{of}: {where} {what}" if of and where else f"{of or where or 'it'} {what}"


def _brief(value: Any) -> str:
    """A value as it can stand in a line: long texts and numbers are cut."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

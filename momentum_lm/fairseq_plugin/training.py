"""What fairseq's trainer lacks for long runs on many machines. :func:`install` gives ``fairseq-train`` the trainer of
this package.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_divided_later = contextvars.ContextVar("_divided_later", default=False)


def install() -> None:
    """Puts :class:`Trainer` in the place of fairseq's, and lets ``--ddp-backend fully_sharded`` build a model without
    fairscale.

    fairseq's own language modelling task, to which a checkpoint of ours may be given, learns to look at the dictionary
    recorded there.
    """
    import fairseq.distributed
    import fairseq.trainer
    from fairseq.tasks.language_modeling import LanguageModelingTask

    from .trainer import Trainer

    LanguageModelingTask.load_state_dict = load_task_state
    names = {"Trainer": Trainer, "fsdp_enable_wrap": _build_to_divide, "fsdp_wrap": lambda module, **options: module}
    # fairseq_cli.train took its names already where --user-dir brings us in: that is read after its imports
    for module in (fairseq.trainer, fairseq.distributed, sys.modules.get("fairseq_cli.train")):
        for name, value in names.items():
            if hasattr(module, name):
                setattr(module, name, value)


def load_task_state(task: Any, state: dict[str, Any]) -> None:
    """A task's ``load_state_dict``, of what checkpoints hold as ``task_state``. Raises UserError for another dictionary
    than the task's.
    """
    from momentum_lm.text.dictionary import DIGEST, check_symbols

    state = dict(state) if isinstance(state, Mapping) else {}
    options = getattr(task, "args", None) or task.cfg  # as tasks of fairseq's older and newer kind call them
    whose = f"the dictionary of {getattr(options, 'data', 'the data')}"
    check_symbols(task.source_dictionary.symbols, state.pop(DIGEST, None), whose)
    task.state.merge_state_dict(state)


@contextlib.contextmanager
def _build_to_divide(config: Any) -> Iterator[None]:
    """Around fairseq's building of a model that the trainer divides."""
    token = _divided_later.set(True)
    try:
        yield
    finally:
        _divided_later.reset(token)


def building_place() -> contextlib.AbstractContextManager[Any]:
    """Where a model is built: a fully sharded one in the first process alone, which sends the others their parts. They
    build its shape only (on the device ``meta``), so that eight processes of a machine do not hold eight models of 13B.
    """
    import torch
    import torch.distributed as dist

    if _divided_later.get() and dist.is_initialized() and dist.get_rank() > 0:
        return torch.device("meta")
    return contextlib.nullcontext()

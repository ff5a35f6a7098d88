"""Whether fairseq can build what a checkpoint names."""

from __future__ import annotations

import argparse
import copy
from typing import Any

from fairseq import models, tasks
from fairseq.dataclass.utils import merge_with_parent

from momentum_lm.errors import UserError


def check_components(cfg: Any, sections: tuple[str, ...]) -> None:
    """Raises UserError where fairseq does not know the task or the model of a checkpoint, or they not its options: it
    would fail deep inside of its registries.

    sections: "task" and "model", or the one of them that is going to be built.
    """
    registries = {
        "task": ("task", tasks.TASK_REGISTRY, tasks.TASK_DATACLASS_REGISTRY),
        "model": ("arch", {**models.ARCH_MODEL_REGISTRY, **models.MODEL_REGISTRY}, models.MODEL_DATACLASS_REGISTRY),
    }
    for section in sections:
        old_name, known, dataclasses = registries[section]
        options = cfg.get(section) if cfg is not None else None
        if options is None or not hasattr(options, "__contains__"):
            raise UserError(f"it has no options of its {section}")
        name = getattr(options, old_name, None) if section == "task" else None
        name = name if isinstance(name, str) else getattr(options, "_name", None) or getattr(options, old_name, None)
        size = len(vars(options) if isinstance(options, argparse.Namespace) else options)
        if name is None and section == "model" and size == 1:
            continue  # options in a folder of the model's name, which fairseq looks up itself
        if not isinstance(name, str):
            raise UserError(f"it does not name its {section}")
        if name not in known:
            raise UserError(f"its {section} {name[:80]!r} is not known here; if a plugin has it, add --user-dir")
        if name in dataclasses and not isinstance(options, argparse.Namespace):
            try:
                merge_with_parent(dataclasses[name](), copy.deepcopy(options), section == "model")
            except Exception as error:  # omegaconf's, of many kinds
                raise UserError(
                    f"its {section} {name} has an option that it does not take: {' '.join(str(error).split())[:200]}"
                ) from error

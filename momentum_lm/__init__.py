"""Language models with momentum attention, in-context learning measurements, and their fairseq components.

Importing this package imports neither torch nor fairseq.
"""

from __future__ import annotations

__version__ = "0.2.0"


def register() -> None:
    """Hands the models, criterions, optimizers and tasks to fairseq. Harmless to call again: importing a module twice
    runs it once.

    fairseq_compat calls it after fairseq's import (through the entry point ``fairseq.plugins``) and after
    ``--user-dir``.
    """
    import importlib

    for package in ("models", "criterions", "optim", "tasks"):
        importlib.import_module(f"{__name__}.fairseq_plugin.{package}")
    importlib.import_module(f"{__name__}.fairseq_plugin.training").install()

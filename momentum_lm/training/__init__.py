"""What fairseq's trainer lacks for long runs on many machines. :func:`install` gives ``fairseq-train`` the trainer of this package."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


def install() -> None:
    """Puts :class:`Trainer` in the place of fairseq's, and lets ``--ddp-backend fully_sharded`` build a model without fairscale."""
    import fairseq.distributed
    import fairseq.trainer

    from .trainer import Trainer

    names = {"Trainer": Trainer, "fsdp_enable_wrap": _build_whole, "fsdp_wrap": lambda module, **options: module}
    # fairseq_cli.train took its names already where --user-dir brings us in: that is read after its imports
    for module in (fairseq.trainer, fairseq.distributed, sys.modules.get("fairseq_cli.train")):
        for name, value in names.items():
            if hasattr(module, name):
                setattr(module, name, value)


@contextlib.contextmanager
def _build_whole(config: Any) -> Iterator[None]:
    """The trainer divides the model when it is built."""
    yield

"""TensorBoard events of one run, its hyper-parameters included, so that runs compare in the HParams tab."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries


class TrainingLog:
    """Writes scalars, histograms and hyper-parameters into one folder, which TensorBoard shows as one run.

    The hyper-parameters are written at once, so that a run that is killed is in the HParams tab too; its columns of
    metrics are the run's scalars. ``SummaryWriter.add_hparams`` does not do: it makes a second run, and fixes the
    columns for all runs by those of one. Closing twice is harmless. Use as a context manager, or call ``close`` from
    ``atexit``: an interrupted program then loses nothing.
    """

    def __init__(self, logdir: str | os.PathLike[str], hparams: Mapping[str, Any], suffix: str = "") -> None:
        """``hparams``: numbers, booleans and strings; None is left out and anything else written as its text.
        ``suffix``: of the event file's name."""
        self._writer: SummaryWriter | None = SummaryWriter(os.fspath(logdir), flush_secs=30, filename_suffix=suffix)
        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in hparams.items() if v is not None
        }
        # The first summary, the experiment's columns, is left out: without it TensorBoard collects the columns of all
        # runs itself.
        _, session_start, self._session_end = hparams_summaries(plain, {})
        self._add(session_start)
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of each curve."""
        for tag, value in values.items():
            self._open().add_scalar(tag, float(value), step)

    def histogram(self, tag: str, tensor: Tensor, step: int) -> None:
        """The distribution of the finite elements of a tensor of any shape and dtype; without any, nothing is
        written."""
        values = tensor.detach().to("cpu", torch.float32).flatten()
        values = values[values.isfinite()]
        if values.numel():
            self._open().add_histogram(tag, values, step)

    def hparams_with_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Metrics to compare runs by: the latest value of each stands beside the hyper-parameters under
        ``hparam/<name>``."""
        self.scalars({f"hparam/{name}": value for name, value in metrics.items()}, step or 0)
        self.flush()

    def layout(self, charts: Mapping[str, Sequence[str]]) -> None:
        """What the Custom Scalars tab shows, of all runs: for each title the tags that match one of its patterns."""
        lines = {title: ["Multiline", [*tags]] for title, tags in charts.items()}
        self._open().add_custom_scalars({"momentum_lm": lines})

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int = 0) -> None:
        """A picture, (height, width, 3), shown in the Images tab."""
        self._open().add_image(tag, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Puts everything written so far on disk."""
        self._open().flush()

    def close(self) -> None:
        """Ends the run and writes what is pending. Nothing can be written afterwards."""
        if self._writer is not None:
            self._add(self._session_end)
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, summary: Any) -> None:
        file_writer = self._open().file_writer
        assert file_writer is not None  # SummaryWriter makes it in __init__
        file_writer.add_summary(summary)

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            raise ValueError("the log is closed")
        return self._writer

"""Rows go to the disk in a thread, while the next pass runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from megatron_direct.gradients.store import SketchWriter


class AppendThread:
    """Appends to the writer of a store in a thread of its own, in order, and closes it at the end.

    An append waits for the one before it, so that no more than two passes' rows are held on a disk
    that is slower than the passes. What an append raises, the next one raises, or ``close``: it
    waits for the last append, so that every row handed over is on the disk once it has returned.
    """

    def __init__(self, writer: SketchWriter):
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, "append")
        self._under_way: Future[None] | None = None

    def append(self, rows: np.ndarray, datasets: np.ndarray, documents: np.ndarray,
               losses: np.ndarray) -> None:
        """As ``SketchWriter.append``; the arrays must not be changed any more."""
        self._wait()
        self._under_way = self._thread.submit(
            self._writer.append, rows, datasets, documents, losses)

    def close(self) -> None:
        try:
            self._wait()
        finally:
            self._thread.shutdown()
            self._writer.close()

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

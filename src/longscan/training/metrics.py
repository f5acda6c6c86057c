"""What a run measured: one JSON line per step, and the same as TensorBoard events."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from longscan.errors import StorageError
from longscan.nn.storage import write_text

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "events"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that a killed process left half written is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Metrics:
    """Appends to ``metrics.jsonl`` and the event files of a run that goes on after ``step`` steps.

    Lines of later steps, written by a process that was killed before its next checkpoint, are dropped first. The events
    are written anew from the lines that stay, so that both tell the same, without gaps or doubles.

    Raises:
        StorageError: a file cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS_FILE
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        try:
            shutil.rmtree(folder / EVENTS_FOLDER, ignore_errors=True)
            self._events = SummaryWriter(str(folder / EVENTS_FOLDER))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise StorageError(f"cannot write metrics to {folder}: {error}") from error
        self._path = path
        for row in kept:
            self._show(row)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write rows, each with its ``step``."""
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
            for row in rows:
                self._show(row)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}") from error

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        try:
            os.fsync(self._file.fileno())
            self._events.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}") from error

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _show(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step":
                self._events.add_scalar(key, value, row["step"])

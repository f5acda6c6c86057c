"""What a benchmark found: rows of figures, and the machine they hold on; to JSON and back."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longscan import diagnostics
from longscan.bench.timing import Timing
from longscan.errors import DataError
from longscan.nn.storage import write_text


@dataclass(frozen=True)
class Row:
    """One contender in one setting.

    `group` names what is compared with one another (setting, dtype, phase). `value` is the median in the report's unit.
    `kind` is "ours", "peer", "other" (it computes something else over the same shape) or "floor". `error` is the
    relative difference (root mean square) of its output from the definition's. `note` says why there is no figure, or
    what to know of it.

    `bandwidth` is the bytes that the work has to move over the time (bytes per second), `of_floor` the part of its time
    that the slowest floor would take, `memory` the bytes that were allocated at the peak of a pass beyond what was
    there before (NVIDIA GPUs; None elsewhere). `series` and `place` say where it stands in a figure of lines: the
    panel, and the length or the batch.
    """

    group: str
    contender: str
    kind: str
    timing: Timing | None = None
    value: float | None = None
    error: float | None = None
    note: str = ""
    bandwidth: float | None = None
    of_floor: float | None = None
    memory: int | None = None
    series: str = ""
    place: int | None = None


@dataclass(frozen=True)
class Report:
    """One run of one benchmark. With `higher_is_better` the values are rates, else times; `note` is about them all."""

    bench: str
    unit: str
    higher_is_better: bool
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=diagnostics.describe_machine)
    versions: dict[str, str] = field(default_factory=diagnostics.versions)
    commit: str | None = field(default_factory=diagnostics.commit)
    note: str = ""
    command: str = field(default_factory=diagnostics.command_line)
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    )

    def groups(self) -> list[str]:
        """The groups of rows, in the order they were measured."""
        return list(dict.fromkeys(row.group for row in self.rows))

    def of(self, group: str) -> list[Row]:
        """The rows of one group."""
        return [row for row in self.rows if row.group == group]

    def ours(self, group: str) -> Row | None:
        """The row that the others of its group are compared with: the first one of ours that has a figure."""
        return next((row for row in self.of(group) if row.kind == "ours" and row.value is not None), None)

    def speedup(self, row: Row) -> float | None:
        """How many times faster longscan is than `row`; below 1 it is slower. None without both figures."""
        ours = self.ours(row.group)
        if ours is None or ours.value is None or row.value is None:
            return None
        return ours.value / row.value if self.higher_is_better else row.value / ours.value

    @property
    def failed(self) -> list[Row]:
        """Rows of ours that have no figure: they gave wrong numbers or none."""
        return [row for row in self.rows if row.kind == "ours" and row.value is None]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON; a write that fails leaves what was there.

        Raises:
            StorageError: the file could not be written.
        """
        return write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Reads what :meth:`save` wrote.

        Raises:
            DataError: the file is missing, or no report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [
                Row(**{**row, "timing": None if row["timing"] is None else Timing(**row["timing"])})
                for row in values.pop("rows")
            ]
            return cls(rows=rows, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not a benchmark's report: {type(error).__name__}: {error}") from error

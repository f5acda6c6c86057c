"""What the papers say: every published figure stands in one file, with its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from longscan.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Published:
    """One published table.

    Args:
        source: paper, table or figure.
        figures: system -> length, or another key of the task's figures -> figure as it is shown, such as percent.
        note: what one has to know to read it.
    """

    source: str
    figures: Mapping[str, Mapping[int, float]]
    note: str = ""

    def of(self, system: str, key: int) -> float | None:
        """The figure of a system, if there is one."""
        return self.figures.get(system, {}).get(key)


def beside(published: Mapping[str, Published], name: str, scale: str) -> Published | None:
    """The table that results of a scale may be held against: scaled down for a CPU it is another experiment."""
    return None if scale == "here" else published.get(name)


def read_published(values: Mapping[str, Any], where: str) -> dict[str, Published]:
    """All tables by name, from the file's content.

    Raises:
        ConfigError: a table has no source, or something in it is no figure.
    """
    tables = {}
    for name, table in values.items():
        try:
            figures = {
                system: {int(length): float(figure) for length, figure in row.items()}
                for system, row in table["figures"].items()
            }
            tables[name] = Published(str(table["source"]), figures, str(table.get("note", "")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: table {name!r} must have a source and figures of the form system.length = figure; {error!r}"
            ) from error
    return tables

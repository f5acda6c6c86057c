"""The table of measured figures that the README shows, made from reports.

`python -m longscan.bench.summary README.md results/bench/*.json` puts it between the two marks in that file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from longscan.bench.report import Report, Row
from longscan.errors import DataError
from longscan.nn.storage import write_text

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def markdown(reports: Sequence[Report]) -> str:
    """A table per machine: a line for each setting, a column for each contender, the fastest one in bold.

    What computes something else than longscan stands in italics and takes no part in that.
    """
    places: dict[str, list[Report]] = {}
    for report in reports:
        places.setdefault(_place(report), []).append(report)
    return "\n\n".join(f"{place}:\n\n{_table(own)}" for place, own in places.items())


def _table(reports: Sequence[Report]) -> str:
    rows = [row for report in reports for row in report.rows]
    columns = [*dict.fromkeys(row.contender for row in rows if row.kind != "floor"), "floor"]
    lines = ["| | unit | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for report in reports:
        for group in report.groups():
            cells = [_cell(report, report.of(group), name) for name in columns]
            lines.append(f"| {report.bench} {group} | {report.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(report: Report, rows: list[Row], name: str) -> str:
    if name == "floor":
        floors = [row.value for row in rows if row.kind == "floor" and row.value is not None]
        # The floor that binds: the slowest.
        return f"{min(floors) if report.higher_is_better else max(floors):.3g}" if floors else ""
    own = next((row for row in rows if row.contender == name and row.value is not None), None)
    if own is None or own.value is None:
        return ""
    if own.kind == "other":
        return f"*{own.value:.3g}*"
    timed = [row.value for row in rows if row.kind in ("ours", "peer") and row.value is not None]
    best = max(timed) if report.higher_is_better else min(timed)
    return f"**{own.value:.3g}**" if own.value == best else f"{own.value:.3g}"


def _place(report: Report) -> str:
    machine, versions = report.machine, report.versions
    where = machine["gpus"][0] if machine["gpus"] and report.settings.get("device") != "cpu" else None
    where = where or f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_features']}"
    return f"{where} (PyTorch {versions['torch']}, {report.date[:10]})"


def replace_figures(document: str, table: str) -> str:
    """`document` with `table` between the marks.

    Raises:
        DataError: the marks are missing.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"the document has no place for figures: expected {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(document: str, *reports: str) -> None:
    path = Path(document)
    table = markdown([Report.load(report) for report in reports])
    write_text(path, replace_figures(path.read_text(encoding="utf-8"), table))


if __name__ == "__main__":
    main(*sys.argv[1:])

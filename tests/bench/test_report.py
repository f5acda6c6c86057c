from __future__ import annotations

import json
from pathlib import Path

import pytest

from longscan.bench import Report, Row, Timing, summary
from longscan.errors import DataError
from longscan.plots.bench import plot_bench
from longscan.plots.lines import draw_lines


def make_report(higher_is_better: bool = False) -> Report:
    rows = [
        Row("g", "longscan", "ours", Timing(2.0, 1.9, 2.2, 5), 2.0, 1e-7),
        Row("g", "transformers", "peer", Timing(8.0, 7.0, 9.0, 5), 8.0, 1e-7),
        Row("g", "mambapy", "peer", note="fails: RuntimeError"),
        Row("g", "floor: memory", "floor", Timing(1.0, 1.0, 1.0, 1), 1.0, note="what it counts"),
    ]
    return Report("scan", "ms", higher_is_better, rows, {"shapes": [[1, 2]]})


def test_survives_json(tmp_path: Path) -> None:
    report = make_report()
    loaded = Report.load(report.save(tmp_path / "deep" / "report.json"))
    assert loaded == report
    assert loaded.machine["cores"] >= 1
    assert loaded.versions["torch"]


def test_speedup_of_times_and_of_rates() -> None:
    times, rates = make_report(), make_report(higher_is_better=True)
    assert times.speedup(times.rows[1]) == 4.0
    assert times.speedup(times.rows[3]) == 0.5
    assert rates.speedup(rates.rows[1]) == 0.25
    assert times.speedup(times.rows[2]) is None
    assert times.failed == []


def test_a_row_of_ours_without_a_figure_is_a_failure() -> None:
    report = Report("scan", "ms", False, [Row("g", "longscan", "ours", note="fails")])
    assert report.failed == report.rows
    assert report.ours("g") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [{"group": 1}]}', '{"rows": [], "surprise": 1}'])
def test_what_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"report\.json"):
        Report.load(path)


@pytest.mark.parametrize("rows", [slice(None), slice(0)])
def test_figure_is_a_png(tmp_path: Path, rows: slice) -> None:
    report = make_report()
    path = Report("scan", "ms", False, report.rows[rows]).save(tmp_path / "report.json")
    figure = plot_bench(path, tmp_path / "report.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bench", ["lengths", "throughput", "memory"])
def test_figure_of_lines(tmp_path: Path, bench: str) -> None:
    rows = []
    for place in (512, 1024):
        for name, kind, value in (("longscan", "ours", 1.0), ("attention", "other", place / 256), ("x", "peer", None)):
            timing = None if bench == "memory" or value is None else Timing(value, value, value, 1)
            rows.append(Row(f"g {place}", name, kind, timing, value, series="forward", place=place))
        rows.append(Row(f"g {place}", "floor: memory", "floor", Timing(0.5, 0.5, 0.5, 1), 0.5))
    report = Report(bench, "ms", bench == "throughput", rows)
    path = report.save(tmp_path / "report.json")
    assert Report.load(path) == report
    canvas = draw_lines(json.loads(path.read_text()))
    (panel,) = canvas.axes
    assert [line.get_label() for line in panel.lines] == ["longscan", "attention"]
    # At 1,024 the other's value is 4.
    assert [text.get_text().strip() for text in panel.texts] == ["0.25x" if bench == "throughput" else "4x"]
    assert plot_bench(path, tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_summary_keeps_what_is_something_else_apart() -> None:
    report = make_report()
    report.rows.append(Row("g", "attention", "other", Timing(0.1, 0.1, 0.1, 5), 0.1, bandwidth=1e9, memory=5))
    lines = summary.markdown([report]).splitlines()
    assert lines[2] == "| | unit | longscan | transformers | mambapy | attention | floor |"
    assert lines[4] == "| scan g | ms | **2** | 8 |  | *0.1* | 1 |"


def test_summary_is_a_table_in_its_place() -> None:
    other = make_report()
    other.machine["cpu"] = "another processor"
    table = summary.markdown([make_report(), other, make_report(higher_is_better=True)])
    assert table.count("| | unit |") == 2
    place, _, *lines = table.splitlines()
    assert place.endswith("):")
    assert lines[0] == "| | unit | longscan | transformers | mambapy | floor |"
    assert lines[2] == "| scan g | ms | **2** | 8 |  | 1 |"
    assert lines[3] == "| scan g | ms | 2 | **8** |  | 1 |"
    assert lines[5].startswith("another processor")
    document = f"before {summary.BEGIN}old{summary.END} after"
    new = summary.replace_figures(document, table)
    assert new.startswith("before <!--")
    assert new.endswith("--> after")
    assert "old" not in new
    assert summary.replace_figures(new, table) == new
    with pytest.raises(DataError, match="no place for figures"):
        summary.replace_figures("nothing", table)

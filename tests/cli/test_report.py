"""`longscan report`: the page says what the files say, needs nothing but itself, and escapes what it is given."""

from __future__ import annotations

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from longscan import diagnostics
from longscan.cli import main
from longscan.models import LanguageModelConfig
from longscan.training.config import TrainConfig
from longscan.training.runs import create_run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
EVIL = "<script>alert(1)</script> & \"'"
# Elements without an end.
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page says, and all that its elements refer to; its elements must nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.headings: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.policy = ""
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []
        assert self.links <= self.anchors

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        values = dict(attributes)
        assert not [name for name in values if name.startswith("on")]
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            address = values.get(name)
            if address is None:
                continue
            if tag == "img":
                assert address.startswith("data:image/png;base64,")
                assert values["alt"]
                self.images.append(base64.b64decode(address.partition(",")[2], validate=True))
            else:
                assert (tag, name, address[0]) == ("a", "href", "#")
                self.links.add(address[1:])
        if "id" in values:
            self.anchors.add(str(values["id"]))
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if data.strip():
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def read(path: Path) -> Page:
    page = Page(path)
    assert page.policy.startswith("default-src 'none'")
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(image.startswith(b"\x89PNG") for image in page.images)
    return page


def make_run(root: Path, name: str = "first", *, finished: bool = True) -> Path:
    """The files that `longscan train` leaves, with what a report must escape."""
    model = LanguageModelConfig(16, 1, 256)
    steps = 40
    config = {
        "longscan": "0.1.0",
        "text": {"data": EVIL, "tokenizer": "bytes"},
        "model": model.to_dict(),
        "training": {**vars(TrainConfig(steps=steps, batch_size=2, sequence_length=50))},
        "corpus": {"label": EVIL, "train_tokens": 8000},
        "device": "cpu",
    }
    if finished:
        config |= {
            "machine": diagnostics.describe_machine(),
            "versions": diagnostics.versions(),
            "commit": "0123456789ab",
        }
    folder = create_run(root, name, config)
    rows: list[dict[str, Any]] = []
    for step in range(1, (steps if finished else 10) + 1):
        row = {"step": step, "learning_rate": 1e-3, "tokens": 100 * step, "seconds": 0.05 * step}
        # A step that was left out has no loss.
        rows.append(row if step == 5 else row | {"loss": 5 / step, "bits_per_byte": 8 / step})
    rows[-1]["held_out_bits_per_byte"] = 1.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        report = {"bits_per_byte": 1.2345, "compressors_bits_per_byte": {"gzip -9": 1.75}}
        (folder / "held_out.json").write_text(json.dumps(report))
        (folder / "sample.txt").write_text(f"\ndef f():\n    {EVIL}\n")
    return folder


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path)
    assert main(["report", str(folder)]) == 0
    page = read(folder / "report.html")
    assert str(folder / "report.html") in capsys.readouterr().out
    assert page.headings == ["first"]
    assert len(page.images) == 2
    # The mean loss of the one step that is a fiftieth of all, and 100 tokens in 0.05 seconds.
    for words in (EVIL, "1.2345", "1.7500", "0.1250", "2,000", "4,000, 0.5 passes", "0123456789ab"):
        assert words in page.text
    assert f"def f():\n    {EVIL}\n" in page.text
    assert diagnostics.versions()["torch"] in page.text
    assert "<script" not in (folder / "report.html").read_text()


def test_runs_beside_one_another_and_one_just_begun(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path, "second", finished=False)
    begun = make_run(tmp_path, "begun", finished=False)
    (begun / "metrics.jsonl").unlink()
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), str(first), "--output", str(page), "--title", EVIL]) == 0
    shown = read(page)
    headings = [EVIL, "Runs beside one another", "begun", "first", "second"]
    assert sorted(shown.headings) == sorted(headings)
    assert "10 of 40" in shown.text
    assert "0 of 40" in shown.text
    assert "No step has been written down yet." in shown.text
    assert str(second) in shown.text


def test_results_of_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tmp_path / "heads" / "induction_heads"
    experiment.mkdir(parents=True)
    shutil.copy(RESULTS / "induction_heads" / "mamba-paper-seed0.json", experiment)
    values = json.loads((experiment / "mamba-paper-seed0.json").read_text())
    (experiment / "mamba-paper-seed1.json").write_text(
        json.dumps({**values, "seed": 1, "label": EVIL, "experiment": "../../induction_heads", "title": EVIL})
    )
    (tmp_path / "heads" / "other.json").write_text("[]")
    page = tmp_path / "page.html"
    paths = [tmp_path / "heads", RESULTS / "compare" / "text-cpu.json", RESULTS / "bench" / "lengths-h100.json"]
    arguments = ["report", *map(str, paths), "--output", str(page), "--experiments", str(ROOT / "experiments")]
    assert main(arguments) == 0
    assert "other.json" in capsys.readouterr().out.partition("left out, being no results:")[2]
    shown = read(page)
    assert len(shown.images) == 4
    assert len(shown.headings) == 5
    # Ours, and the paper's in brackets.
    assert "100.0 (100)" in shown.text
    assert "Gu and Dao 2023" in shown.text
    assert f"{EVIL} (seed 1)" in shown.text
    assert "mamba-ssm" in shown.text
    (comparison,) = [row for row in json.loads(paths[1].read_text())["rows"] if row["mixer"] == "retnet"]
    assert f"{comparison['quality']:.3f}" in shown.text
    assert comparison["note"] == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads", "page.html"]
    # Without published figures ours stand alone.
    assert main([*arguments[:-1], str(tmp_path / "none")]) == 0
    assert "100.0 (100)" not in read(page).text


def test_kept_runs_and_tests_on_a_gpu(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    broken = json.loads((RESULTS / "gpu" / "tests.json").read_text())
    broken["tests"][3] |= {"outcome": "failed", "name": EVIL}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    paths = [RESULTS / "text", tmp_path / "broken.json"]
    assert main(["report", *map(str, paths), "--output", str(page)]) == 0
    shown = read(page)
    files = [json.loads(path.read_text()) for path in sorted((RESULTS / "text").glob("*.json"))]
    assert len(shown.headings) == 1 + len(files) + 1
    (int8,) = (values for values in files if "by_position" in values)
    assert f"{int8['perplexity_ratio']:.6f}" in shown.text
    assert f"{int8['saved']['bits_per_byte']:.4f}" in shown.text
    assert f"{int8['by_position'][-1]['bits_per_byte']:.3f}" in shown.text
    kept = [values for values in files if "by_position" not in values]
    assert len(shown.images) == sum("held_out_estimates_by_step" in values for values in kept)
    for values in kept:
        figures = values.get("held_out_bits_per_byte", {})
        figures = figures or {"model": values["held_out"]["bits_per_byte"]}
        assert f"{figures['model']:.4f}" in shown.text
        assert f"{values['tokens_per_second']:,}" in shown.text
    assert f"{broken['counts']['passed']:,}" in shown.text
    assert broken["machine"]["device"] in shown.text
    assert shown.words.count(EVIL) == 2  # among all, and among those that did not pass


def test_every_result_kept_here_can_be_read() -> None:
    from longscan.bench.report import Report
    from longscan.cli.report import find

    found = find([RESULTS])
    # Reports of tools and soaks have no page.
    assert {path.parent.name for path in found[""]} <= {"gpu", "soak"}
    assert found["text"]
    assert found["tests"]
    assert found["bench"]
    assert found["evaluation"]
    assert found["experiment"]
    for path in found["bench"]:
        Report.load(path)


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bench.json").write_text('{"bench": "scan"}')
    (tmp_path / "compare.json").write_text('{"compare": "text", "settings": {}, "data": {}, "rows": []}')
    (tmp_path / "result.json").write_text('{"experiment": "delay"}')
    values = json.loads((RESULTS / "induction_heads" / "mamba-paper-seed0.json").read_text())
    (tmp_path / "figures.json").write_text(json.dumps({**values, "curve": [["a"]]}))
    damaged = make_run(tmp_path / "runs", "damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 1}\n')
    before = sorted(tmp_path.rglob("*"))
    for place, says in (
        ("nowhere", "no such file or folder"),
        ("empty", "no run of `longscan train`"),
        ("text.json", "is no result of"),
        ("list.json", "is no result of"),
        ("runs/damaged/config.json", "of a run, give the folder"),
        ("bench.json", "is not a benchmark's report"),
        ("compare.json", "damaged, or of another version"),
        ("result.json", "is no result of `longscan reproduce`"),
        ("figures.json", "damaged, or of another version"),
        ("runs/damaged", "damaged, or of another version"),
    ):
        assert main(["report", str(tmp_path / place), "--output", str(tmp_path / "page.html")]) == 2, place
        told = capsys.readouterr().err.replace("\n", " ")
        assert says in told, place
        assert place.split("/")[0] in told
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["report"]) == 2
    assert "name runs or results" in capsys.readouterr().err

"""`longscan evaluate MODEL --tasks ...` on tasks and models that the tests write."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks
import pytest

from longscan.cli import main
from longscan.evaluation.published import ZERO_SHOT_METRICS, published_zero_shot
from longscan.models.export import load_program
from tests.integrations.harness import write_model, write_tasks
from tests.models.small import make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("zero_shot")
    write_model(place)
    (place / "ours").rename(place / "mamba-130m")
    write_tasks(place / "tasks")
    # The paper's names, on documents of our own.
    for name in ZERO_SHOT_METRICS:
        own = "last_word" if name == "lambada_openai" else "animals"
        write_tasks(place / "paper" / name, {own: name})
        for other in place.joinpath("paper", name).glob("*.yaml"):
            if other.stem != name:
                other.unlink()
    return place


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = main(["evaluate", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_the_paper_s_table(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = place / "mamba-130m", ",".join(ZERO_SHOT_METRICS)
    code, text = call(capsys, monkeypatch, model, "--tasks", tasks, "--include-path", place / "paper")
    assert code == 0, text
    report = json.loads((model / "zero_shot.json").read_text())
    lines = {(line["task"], line["metric"]): line for line in report["results"]}
    assert lines["lambada_openai", "perplexity"]["paper"] == 16.07
    assert lines["hellaswag", "acc_norm"]["paper"] == 35.3
    assert lines["hellaswag", "acc"]["paper"] is None
    assert lines["piqa", "acc"]["documents"] == 12
    values = [lines[task, metric]["value"] for task, metric in ZERO_SHOT_METRICS.items()]
    assert report["average"]["value"] == pytest.approx(100 * sum(values) / 6)
    assert report["average"]["paper"] == pytest.approx(44.7, abs=0.06)
    assert report["dtype"] == "float32"
    for word in ("lambada_openai", "winogrande", "35.30 %", "16.07", "average"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "dtype", "weights"),
    [
        (("--precision", "float32"), "float32", "saved"),
        (("--precision", "bfloat16"), "bfloat16", "saved"),
        (("--weights", "int8"), "float32", "int8"),
        (("--weights", "int8", "--precision", "bfloat16"), "bfloat16", "int8"),
    ],
)
def test_precisions_and_int8(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    dtype: str,
    weights: str,
) -> None:
    """The report says what was measured, and likelihoods hardly move."""
    perplexities = []
    for i, chosen in enumerate(((), options)):
        output = tmp_path / f"{i}.json"
        common = ("--tasks", "last_word", "--include-path", place / "tasks", "--output", output, "--device", "cpu")
        code, text = call(capsys, monkeypatch, place / "mamba-130m", *common, *chosen)
        assert code == 0, text
        report = json.loads(output.read_text())
        perplexities += [line["value"] for line in report["results"] if line["metric"] == "perplexity"]
    assert (report["dtype"], report["weights"]) == (dtype, weights)
    assert perplexities[1] == pytest.approx(perplexities[0], rel=0.02)
    assert (perplexities[1] == perplexities[0]) == (options[1] == "float32")


def test_limit_shots_and_output(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--tasks", "animals", "--include-path", place / "tasks", "--limit", 5, "--num-fewshot", 1]
    out = tmp_path / "out.json"
    code, text = call(capsys, monkeypatch, place / "theirs", *options, "--output", out)
    assert code == 0, text
    (line, _) = json.loads(out.read_text())["results"]
    assert (line["task"], line["documents"], line["shots"], line["paper"]) == ("animals", 5, 1, None)
    assert "the first 5 documents" in text
    assert "paper" not in text


def test_a_model_of_bytes(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(vocab_size=256).save_pretrained(tmp_path / "bytes")
    options = ["--tasks", "whole_text", "--include-path", place / "tasks", "--precision", "bfloat16"]
    code, text = call(capsys, monkeypatch, tmp_path / "bytes", *options)
    assert code == 0, text
    report = json.loads((tmp_path / "bytes" / "zero_shot.json").read_text())
    assert report["dtype"] == "bfloat16"
    assert report["results"][0]["value"] > 1


def test_a_run_brings_its_tokenizer(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"{i} squared is {i * i}\n" for i in range(500)))
    small = ["--d-model", "16", "--n-layer", "1", "--batch-size", "2", "--sequence-length", "32", "--device", "cpu"]
    assert main(["train", "text", "--data", "text.txt", "--name", "a", "--steps", "1", "--sample", "0", *small]) == 0
    options = ["--tasks", "animals", "--include-path", place / "tasks", "--limit", 3]
    code, text = call(capsys, monkeypatch, "runs/a", *options)
    assert code == 0, text
    report = json.loads(Path("runs/a/zero_shot.json").read_text())
    assert report["tokenizer"] == "longscan-bytes"
    code, text = call(capsys, monkeypatch, "runs/a", *options, "--tokenizer", "bytes")
    assert code == 2
    assert "a tokenizer of its own" in text
    assert main(["export", "runs/a", "--format", "pt2"]) == 0
    assert load_program("runs/a/step.pt2").graph_signature.user_inputs[0] == "tokens"


def test_errors_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, include = place / "theirs", ["--include-path", place / "tasks"]
    broken = write_tasks(tmp_path / "broken")
    (broken / "documents.jsonl").unlink()
    cases = [
        ([model, "--tasks", ",", *include], "at least one name"),
        ([model, "--tasks", "animals", "--include-path", place / "none"], "is no folder"),
        ([model, "--tasks", "animals", *include, "--limit", "1.5"], "limit must be"),
        ([model, "--tasks", "animals", "--include-path", broken], "cannot be read"),
        ([place / "none", "--tasks", "animals", *include], "no such folder"),
    ]
    for arguments, says in cases:
        code, text = call(capsys, monkeypatch, *arguments)
        assert code == 2, arguments
        assert says in text.replace("\n", ""), arguments


def test_an_unknown_task_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lm_eval.tasks.TaskManager
    # The harness's own thousands take seconds to look through.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: real(**{**options, "include_defaults": False}))
    options = ["--include-path", place / "tasks"]
    code, text = call(capsys, monkeypatch, place / "theirs", "--tasks", "animals,hole_text", *options)
    assert code == 2
    assert "no task 'hole_text'; did you mean whole_text?" in text.replace("\n", " ")


def test_published_figures_know_their_models() -> None:
    assert published_zero_shot("state-spaces/mamba-2.8b-hf")["winogrande", "acc"] == 63.5
    assert published_zero_shot("models/mamba-1.4b")["piqa", "acc"] == 74.2
    assert published_zero_shot("mamba-131m") == {}

"""The main job through its commands: train, stop, kill, go on, generate, evaluate."""

from __future__ import annotations

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longscan.cli import main
from longscan.models import LanguageModel

SMALL = ["--d-model", "16", "--n-layer", "1", "--batch-size", "4", "--sequence-length", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("main_job")
    (place / "text.txt").write_text("".join(f"{i} squared is {i * i}\n" for i in range(3000)))
    return place


def start(place: Path, *arguments: str, python: Sequence[str] = ("-m", "longscan")) -> subprocess.Popen[str]:
    """longscan with some arguments, by Python's own ones."""
    environment = os.environ | {"LONGSCAN_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *python, *arguments]
    return subprocess.Popen(
        command, cwd=place, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def call(place: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(place, *arguments)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def train(name: str, steps: int, *more: str) -> list[str]:
    return ["train", "text", "--data", "text.txt", "--name", name, "--steps", str(steps), *SMALL, *more]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_train_generate_evaluate(place: Path) -> None:
    code, out, error = call(place, *train("first", 6, "--sample", "20"))
    assert code == 0, out + error
    for words in ("gzip -9", "xz -9", "this model", "a sample", "longscan generate runs/first"):
        assert words in out
    run = place / "runs" / "first"
    for name in ("config.json", "model.safetensors", "metrics.jsonl", "curves.png", "held_out.json", "sample.txt"):
        assert (run / name).is_file(), name
    assert list((run / "events").iterdir())
    assert list((run / "checkpoints").iterdir())
    assert LanguageModel.from_pretrained(run).config.d_model == 16
    assert {"machine", "versions", "commit"} <= json.loads((run / "config.json").read_text()).keys()
    assert (run / "sample.txt").read_text() in out

    code, first, error = call(place, "generate", "runs/first", "--prompt", "12 sq", "--max-tokens", "30", "--seed", "1")
    assert code == 0, error
    assert first.startswith("12 sq")
    code, second, _ = call(place, "generate", "runs/first", "--prompt", "12 sq", "--max-tokens", "30", "--seed", "1")
    assert first == second

    code, out, error = call(place, "evaluate", "runs/first")
    assert code == 0, error
    report = json.loads((run / "evaluation.json").read_text())
    trained = json.loads((run / "held_out.json").read_text())
    assert report["bits_per_byte"] == trained["bits_per_byte"]
    assert report["by_position"][0]["bits_per_byte"] > 0
    precision = json.loads((run / "config.json").read_text())["training"]["precision"]
    assert (report["weights"], report["precision"]) == ("saved", precision)
    code, out, error = call(place, "evaluate", "runs/first", "--weights", "int8", "--output", "int8.json")
    assert code == 0, error
    int8 = json.loads((place / "int8.json").read_text())
    assert int8["weights"] == "int8"
    assert int8["bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=0.005)
    assert int8["bits_per_byte"] != report["bits_per_byte"]
    assert int8["saved"] == {key: report[key] for key in ("bits_per_byte", "nats_per_token")}
    assert int8["perplexity_ratio"] == pytest.approx(math.exp(int8["nats_per_token"] - report["nats_per_token"]))
    assert "perplexity" in out
    assert {"machine", "versions", "commit", "command", "model", "training"} <= int8.keys()
    # A prompt may hold bytes that are no text.
    asked = ["--weights", "int8", "--prompt", "12\udcff", "--max-tokens", "5"]
    code, out, error = call(place, "generate", "runs/first", *asked)
    assert code == 0, error
    assert out.startswith("12\N{REPLACEMENT CHARACTER}")
    code, out, error = call(place, "evaluate", "runs/first", "--data", "text.txt", "--output", "other.json")
    assert code == 0, error
    assert json.loads((place / "other.json").read_text())["bytes"] == (place / "text.txt").stat().st_size


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_signals_save_first_and_say_how_to_go_on(place: Path, number: signal.Signals, code: int) -> None:
    name = f"run{code}"
    process = start(place, *train(name, 100000, "--sample", "0"))
    run = place / "runs" / name
    wait_for_step(run, 5, process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code, out + error
    assert f"longscan train --resume runs/{name}" in out
    done = metrics(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert [row["step"] for row in metrics(run)] == list(range(1, done + 1))


def test_killed_at_any_moment_equals_never_stopped(place: Path) -> None:
    steps = 150
    more = ["--checkpoint-minutes", "0.002", "--sample", "0"]
    code, out, error = call(place, *train("whole", steps, *more))
    assert code == 0, out + error
    moments = random.Random(0)
    run = place / "runs" / "killed"
    arguments = train("killed", steps, *more)
    for _ in range(3):
        process = start(place, *arguments)
        done = len((run / "metrics.jsonl").read_bytes().splitlines()) if (run / "metrics.jsonl").is_file() else 0
        wait_for_step(run, min(steps - 20, max(1, done - 20)), process)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.communicate()
        arguments = ["train", "--resume", "runs/killed", "--sample", "0"]
    code, out, error = call(place, *arguments)
    assert code == 0, out + error
    assert metrics(place / "runs" / "whole") == metrics(run)
    held_out = [json.loads((place / "runs" / name / "held_out.json").read_text()) for name in ("whole", "killed")]
    assert held_out[0] == held_out[1]
    weights = [(place / "runs" / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_resume_refuses_other_options(place: Path) -> None:
    if not (place / "runs" / "whole").is_dir():
        assert call(place, *train("whole", 3, "--sample", "0"))[0] == 0
    code, _, error = call(place, "train", "text", "--resume", "runs/whole", "--d-model", "32")
    assert code == 2
    assert "model.d_model is 16 there and 32 here" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "text", "--data", "nowhere.txt"], "neither a file nor a folder"),
        (["train", "--resume", "nowhere"], "nowhere: no such folder"),
        (["train", "--resume", "."], "is not a run"),
        (["train", "text", "--steps", "0"], "steps must be at least 1"),
        (["train", "text", "--sample", "-1"], "sample must not be negative"),
        (["train", "text", "--name", "a/b"], "name must be a plain folder name"),
        (["train", "text", "--data", "short.txt", *SMALL], "fewer than one sequence"),
        (["train", "text", "--data", "empty.txt"], "part empty"),
        (["generate", "runs/none"], "no such folder"),
        (["generate", "runs/none", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["evaluate", "."], "is not a run"),
        (["evaluate", ".", "--length", "0"], "length must be at least 1"),
        (["trian"], "did you mean 'train'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(place: Path, arguments: list[str], says: str) -> None:
    (place / "short.txt").write_text("short\n" * 4)
    (place / "empty.txt").write_text("")
    code, _, error = call(place, *arguments)
    assert code == 2
    assert says in error
    assert "Traceback" not in error


def test_a_terminal_of_another_encoding_shows_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["--version"]) == 0
    sys.stdout.write("\N{GREEK SMALL LETTER DELTA}")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"?")


def test_version_help_and_speed_of_start(place: Path) -> None:
    from longscan import __version__

    code, out, _ = call(place, "--version")
    assert (code, out.strip()) == (0, f"longscan {__version__}")
    code, out, _ = call(place)
    assert code == 0
    for command in ("train", "generate", "evaluate", "bench", "doctor"):
        assert command in out
    check = "import sys, longscan.cli; longscan.cli.main(['--version']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 0

"""Mixers trained alike, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longscan.bench import compare, trials
from longscan.cli import compare as command
from longscan.errors import ArgumentError, DataError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.tasks.text import TextConfig

SMALL = compare.Settings(task="induction_heads", d_model=16, n_layer=1, steps=3, batch_size=2, length=16)


def test_a_second_call_goes_on_and_may_name_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    told: list[tuple[str, int, int]] = []
    first = compare.run(
        SMALL, ("mamba", "lstm"), path, lambda name, step, steps, loss: told.append((name, step, steps))
    )
    assert told == [(name, step, 3) for name in ("mamba", "lstm") for step in (1, 2, 3)]
    told.clear()
    second = compare.run(SMALL, ("s4d", "lstm"), path, lambda *now: told.append(now[:3]))
    assert {name for name, *_ in told} == {"s4d"}
    assert [row["mixer"] for row in second["rows"]] == ["s4d", "lstm", "mamba"]
    assert second["rows"][1:] == first["rows"][::-1]
    assert json.loads(path.read_text()) == second
    for row in second["rows"]:
        assert 0 <= row["quality"] <= 1
        assert row["losses"][-1][0] == 3
        assert min(row[key] for key in ("step_ms", "state_bytes", "memory_bytes", "train_tokens_per_second")) > 0
    with pytest.raises(DataError, match=r"batch_size 2, now 3"):
        compare.run(compare.Settings(**{**first["settings"], "batch_size": 3}), ("mamba",), path)
    path.write_text("[]")
    with pytest.raises(DataError, match="not a comparison"):
        compare.run(SMALL, ("mamba",), path)


def test_the_same_seed_trains_the_same_model(tmp_path: Path) -> None:
    one, other = (compare.run(SMALL, ("lstm",), tmp_path / name)["rows"][0] for name in ("1.json", "2.json"))
    assert one["losses"] == other["losses"]
    assert one["quality"] == other["quality"]


def test_memory_is_what_the_backward_pass_is_kept() -> None:
    x = torch.randn(100, requires_grad=True)
    with compare._memory("cpu") as used:
        y = (2 * x).exp()
        (y * y[:50].sum()).sum()
    # exp keeps its output; of the product both sides are kept, one of them that same output.
    assert used == [400 + 4]


def test_a_mixer_that_fails_is_noted_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.Synthetic, "loss", lambda self, model, *batch: model(batch[0])[0].sum() * float("nan"))
    (row,) = compare.run(SMALL, ("lstm",), tmp_path / "found.json")["rows"]
    assert "step 1: the loss is nan" in row["note"]
    monkeypatch.undo()
    (row,) = compare.run(SMALL, ("lstm",), tmp_path / "found.json")["rows"]
    assert row["note"] == ""


def test_text_is_judged_in_bits_per_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    for index in range(40):
        (tmp_path / f"{index}.txt").write_text(f"{index} " * 200)
    trial = trials.Text(16, 2, 0, "cpu", TextConfig(data=str(tmp_path), held_out=0.2))
    model = LanguageModel(LanguageModelConfig(8, 1, trial.vocab_size))
    tokens, targets = trial.batch(0)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    # Untrained: about the entropy of 256 equal bytes.
    assert trial.quality(model) == pytest.approx(8, abs=0.5)


def test_the_command(tmp_path: Path) -> None:
    options = command.Options(
        task="selective_copying",
        mixers="mamba,h3/s4d",
        d_model=8,
        n_layer=1,
        minutes=1e-4,
        batch_size=2,
        length=20,
        output=tmp_path / "found.json",
    )
    console = Console(width=120, record=True, file=(tmp_path / "out.txt").open("w"))
    assert command.run(options, console) == 0
    text = console.export_text()
    assert all(word in text for word in ("h3/s4d", "mamba", "accuracy", "state B", "kept for the backward pass"))
    assert (tmp_path / "found.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixers": "mamba,s5d"}, r"mixers: 's5d': .*did you mean"),
        ({"mixers": "h4/s4d"}, "block must be one of"),
        ({"mixers": " ,"}, "mixers: got none"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2, "minutes": 1.0}, "one of the two"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_what_goes_wrong_is_said(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    options = {"task": "induction_heads", "length": 16, "output": tmp_path / "no.json", "device": "cpu", **changes}
    with pytest.raises(ArgumentError, match=words):
        command.run(command.Options(**options))  # type: ignore[arg-type]

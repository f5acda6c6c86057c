"""`longscan export` from folders to files that load."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from longscan.cli import main
from longscan.models.export import load_program
from tests.models.small import make


@pytest.mark.compile
def test_writes_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(n_layer=1)
    folder = model.save_pretrained(tmp_path / "model")
    assert main(["export", str(folder)]) == 0
    assert "any batch" in capsys.readouterr().out
    assert onnx.load(folder / "step.onnx").graph.input[0].name == "tokens"
    out = tmp_path / "out.pt2"
    assert main(["export", str(folder), "--format", "pt2", "--what", "prefill", "--output", str(out)]) == 0
    tokens = torch.tensor([[1, 2, 3]])
    logits, _ = load_program(out).module()(tokens, model.initial_state(1))
    torch.testing.assert_close(logits, model(tokens)[0][:, -1], rtol=1e-4, atol=1e-5)
    assert main(["export", str(folder), "--format", "pt2", "--plain", "--batch", "1", "--output", str(out)]) == 0
    assert "longscan" not in {getattr(n.target, "namespace", "") for n in load_program(out).graph.nodes}


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make("mixed").save_pretrained(tmp_path / "mixed")
    for arguments, says in (
        ([str(folder)], "attention cannot be exported"),
        ([str(folder), "--what", "prefill"], "take --format pt2"),
        ([str(tmp_path / "none")], "no such folder"),
    ):
        assert main(["export", *arguments]) == 2
        assert says in capsys.readouterr().err.replace("\n", " ")

"""The card tells what files of the run say, and nothing else; what is uploaded is a model that loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longscan.errors import CheckpointError
from longscan.models import LanguageModel
from tests.models.small import make

pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")
hf = pytest.importorskip("longscan.integrations.transformers")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """As `longscan train` leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    held_out = {
        "text": "books", "bytes": 123456, "bits_per_byte": 2.125, "compressors_bits_per_byte": {"gzip": 3.5},
        "how": "every byte predicted",
    }  # fmt: skip
    (folder / "held_out.json").write_text(json.dumps(held_out))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 1.25, "lr": 0.001}\n{"step"')
    (folder / "config.json").write_text(json.dumps({"model": {}, "training": {"steps": 2, "seed": 7}}))
    return folder


def test_a_card(run: Path) -> None:
    model = hf.LongscanForCausalLM.from_longscan(make("mixed"))
    card = hf.model_card(model, run)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for words in (
        f"{parameters:,} parameters: 3 layers of attention and s4d and mamba, width 16, 13 tokens.",
        "On held-out text (books):",
        "| bits per byte | 2.125 |",
        "| compressors bits per byte (gzip) | 3.5 |",
        "| bytes | 123,456 |",
        "How: every byte predicted.",
        "| loss | 1.25 |",
        '"seed": 7',
    ):
        assert words in card
    assert hub.ModelCard(card).data.pipeline_tag == "text-generation"
    # The fuller measurement goes first.
    (run / "evaluation.json").write_text(json.dumps({"text": "letters", "bits_per_byte": 1.5}))
    assert "letters" in hf.model_card(model, run)
    assert "books" not in hf.model_card(model, run)


def test_no_figure_is_made_up(run: Path) -> None:
    model = hf.LongscanForCausalLM.from_longscan(make())
    card = hf.model_card(model)
    assert "Nothing was recorded with this upload." in card
    assert "|" not in card
    for path in run.iterdir():
        path.unlink()
    assert "The run run holds no figures." in hf.model_card(model, run)
    (run / "held_out.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"held_out\.json"):
        hf.model_card(model, run)
    with pytest.raises(CheckpointError, match="no such folder"):
        hf.model_card(model, run / "nowhere")


@pytest.mark.parametrize("has_card", [True, False])
def test_upload(has_card: bool, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is not there: what it is sent, and that a card in the repository stays."""
    model, sent = hf.LongscanForCausalLM.from_longscan(make()), {}

    class Api:
        def __init__(self, token: Any) -> None:
            sent["token"] = token

        def create_repo(self, name: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def file_exists(self, repo_id: str, name: str, revision: str | None) -> bool:
            return has_card

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
            folder = Path(folder_path)
            sent.update(options, repo=repo_id, files={path.name for path in folder.iterdir()})
            sent["parameters"] = LanguageModel.from_pretrained(folder).num_parameters()
            sent["card"] = (folder / "README.md").read_text() if (folder / "README.md").exists() else None
            return SimpleNamespace(commit_url="https://there/commit")

    monkeypatch.setattr(hub, "HfApi", Api)
    assert model.push_to_hub("small", run=run, token="secret", revision="draft") == "https://there/commit"
    assert (sent["repo"], sent["token"], sent["revision"]) == ("me/small", "secret", "draft")
    assert sent["parameters"] == model.to_longscan().num_parameters()
    assert sent["files"] >= {"config.json", "model.safetensors"}
    assert sent["card"] is None if has_card else "bits per byte" in sent["card"]

"""A run's tokenizer gives Transformers the tokens that the run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.errors import ConfigError, DataError
from longscan.tasks.tokenizers import ByteTokenizer, load_tokenizer
from tests.models.small import make

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("longscan.integrations.transformers")


def make_run(folder: Path, tokenizer: str) -> Path:
    config = {"format": 1, "text": {"tokenizer": tokenizer}, "model": {}, "training": {}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> object:
    return hf.tokenizer_of(make_run(tmp_path_factory.mktemp("run"), "bytes"))


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_bytes(of_bytes: object, text: str) -> None:
    tokens = of_bytes(text)["input_ids"]  # type: ignore[operator]
    assert tokens == [0, *ByteTokenizer().encode(text.encode()).tolist()]
    assert of_bytes.decode(tokens, skip_special_tokens=True) == text  # type: ignore[attr-defined]


def test_text_in_and_out(of_bytes: object, tmp_path: Path) -> None:
    """Through a folder, in a batch of different lengths: what the model itself writes."""
    hf.register()
    model = make(vocab_size=256).eval()
    of_bytes.save_pretrained(model.save_pretrained(tmp_path))  # type: ignore[attr-defined]
    write = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["to scan long", "Ä"]
    found = write(prompts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False, eos_token_id=None)
    tokens = model.generate([[0, *prompt.encode()] for prompt in prompts], 5, temperature=0).tokens
    decode = of_bytes.decode  # type: ignore[attr-defined]
    assert [row[0]["generated_text"] for row in found] == [decode(row, skip_special_tokens=True) for row in tokens]


@pytest.mark.parametrize("border", [True, False])
def test_a_trained_one(border: bool, tmp_path: Path) -> None:
    """With a border of its own, or with the one that training adds behind its last token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["</s>"] if border else []
    words = {word: number for number, word in enumerate([*names, "?", "a", "b", "c"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    run = make_run(tmp_path, "somewhere/else")
    inner.save(str(run / "tokenizer.json"))
    ours, theirs = load_tokenizer(str(run)), hf.tokenizer_of(run)
    assert theirs("a c b")["input_ids"] == [ours.border, *ours.encode(b"a c b").tolist()]
    assert theirs.eos_token_id == theirs.pad_token_id == ours.border
    assert len(theirs) == ours.vocab_size


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        hf.tokenizer_of(tmp_path / "nowhere")
    run = make_run(tmp_path, "somewhere/else")
    (run / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot load"):
        hf.tokenizer_of(run)

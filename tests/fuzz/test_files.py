"""Damaged files: checkpoints, weights, shards, configurations. Refused in words, or read; nothing of theirs is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan import LanguageModel, LanguageModelConfig
from longscan.cli.config import merge, read_toml
from longscan.cli.train_options import Options, saved_options
from longscan.errors import CheckpointError, DataError
from longscan.mixers import MIXERS
from longscan.models.options import mixer_option_names
from longscan.models.pretrained import load_config
from longscan.nn.storage import file_digest, load_pickled, load_tensors
from longscan.tasks.corpus import build_corpus, open_corpus
from longscan.tasks.sources import open_source
from longscan.tasks.tokenizers import ByteTokenizer, load_tokenizer
from longscan.training.config import TrainConfig
from longscan.training.runs import create_run
from longscan.training.sealed import describe_checkpoint, newest_sound, place, seal
from tests.fuzz.damage import DEEP, VALUES, damaged, refused_or_read

FUZZ = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, with pickled weights in a folder of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    shape = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16, mixer_options={"d_state": 2})
    LanguageModel(shape).save_pretrained(folder)
    LanguageModel(shape).save_pretrained(folder / "pickled", format="mamba-ssm")
    return folder


@FUZZ
@given(data=st.data())
def test_weights(model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Anywhere, or in the header, where it costs most."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(model / "config.json", folder)
    content = (model / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(data.draw(damaged(content, data.draw(st.sampled_from([None, head, 8])))))
    with refused_or_read(folder):
        load_tensors(folder / "model.safetensors")
    with refused_or_read(folder):
        LanguageModel.from_pretrained(folder)


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["__metadata__", "a", "b"]), VALUES | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F4", "F8_E8M0", "BOOL", "C64", "I64", "X"]), "shape": VALUES,
     "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3)})))  # fmt: skip
def test_headers_of_others(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    text = json.dumps(header).encode()
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with refused_or_read(folder):
        load_tensors(folder / "x.safetensors")


@FUZZ
@given(data=st.data())
def test_pickled_weights(model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(model / "pickled" / "config.json", folder)
    content = (model / "pickled" / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data.draw(damaged(content)))
    with refused_or_read(folder):
        LanguageModel.from_pretrained(folder)


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self.path,)


@pytest.mark.parametrize("container", ["plain", "zip"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "manifest.json", "checkpoint.json"])
def test_no_pickle_is_run(tmp_path: Path, model: Path, name: str, container: str) -> None:
    shutil.copy(model / "config.json", tmp_path)
    content, made = pickle.dumps({"backbone.embedding.weight": _Touch(tmp_path / "made")}), tmp_path / "made"
    if container == "plain":
        (tmp_path / name).write_bytes(content)
    else:
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError):
        LanguageModel.from_pretrained(tmp_path)
    for read in (load_pickled, load_tensors, lambda path: describe_checkpoint(path.parent)):
        with pytest.raises(CheckpointError):
            read(tmp_path / name)
    with pytest.raises(DataError):
        open_corpus(tmp_path)
    assert not made.exists()
    pickle.loads(content)
    assert made.exists()  # it would have


@FUZZ
@given(data=st.data())
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A damaged one is never the newest sound one."""
    root = tmp_path_factory.mktemp("fuzz")
    for step in (1, 2):
        final, building = place(root, step)
        building.mkdir()
        (building / "x").write_bytes(b"content")
        seal(building, final, {"format": 1, "step": step}, {"x": file_digest(building / "x")})
    name = data.draw(st.sampled_from(["x", "checkpoint.json"]))
    content = (final / name).read_bytes()
    changed = data.draw(damaged(content))
    (final / name).write_bytes(changed)
    sound, faults = newest_sound(root)
    if sound == final:
        assert name == "checkpoint.json" or changed == content
        assert json.loads((final / "checkpoint.json").read_text())["step"] == 2
    else:
        assert sound == place(root, 1)[0]
        assert name in faults[0]


@FUZZ
@given(data=st.data())
def test_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "text").write_text("".join(f"line {i}\n" for i in range(50)))
    source, shards = open_source(str(folder / "text")), folder / "shards"
    sound = build_corpus(source, ByteTokenizer(), held_out=0.2, out=shards, shard_tokens=64)
    before = np.array(sound.train), np.array(sound.held_out)
    path = data.draw(st.sampled_from(sorted(shards.iterdir())))
    changed = data.draw(damaged(path.read_bytes()))
    # Another file: what is mapped above must not change beneath.
    path.unlink()
    path.write_bytes(changed)
    with refused_or_read(folder):
        found = open_corpus(shards)
        np.testing.assert_array_equal(np.array(found.train), before[0])
        np.testing.assert_array_equal(np.array(found.held_out), before[1])


SHAPE = LanguageModelConfig().to_dict()
CONFIGS = st.dictionaries(
    st.sampled_from([*SHAPE, "model_type", "ssm_cfg", "rms_norm", "hidden_size", "num_hidden_layers", "vocab_size",
                     "pad_vocab_size_multiple", "unpadded_vocab_size", "time_step_limit", "n_groups", "model"]),
    VALUES | st.sampled_from(["mamba", "mamba2", "falcon_mamba", "longscan", 1, 16, ["mamba"]]),
)  # fmt: skip


@settings(FUZZ, max_examples=150)
@given(values=CONFIGS)
def test_configurations_of_models(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(values))
    with refused_or_read(folder):
        load_config(folder)
    with refused_or_read(folder):
        LanguageModelConfig.from_dict(values)
    with refused_or_read(folder):
        LanguageModelConfig.from_json(json.dumps(values))


@settings(FUZZ, max_examples=100)
@given(data=st.data(), mixer=st.sampled_from(sorted(MIXERS)))
def test_options_of_mixers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, mixer: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    small = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-2, 9) | st.text(max_size=4)
    options = st.dictionaries(st.sampled_from(mixer_option_names(mixer)), small | st.lists(small, max_size=3))
    values = {"d_model": 8, "n_layer": 1, "mixer": mixer, "mixer_options": data.draw(options)}
    (folder / "config.json").write_text(json.dumps(values))
    with refused_or_read(folder):
        LanguageModel.from_pretrained(folder)


@settings(FUZZ, max_examples=100)
@given(data=st.data(), part=st.sampled_from(["text", "model", "training", "device", "launch"]))
def test_configurations_of_runs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, part: str) -> None:
    options = Options()
    values: dict[str, Any] = {
        "text": {"data": "stdlib"}, "model": SHAPE, "training": {"steps": 1}, "corpus": {}, "device": "cpu",
        "launch": None,
    }  # fmt: skip
    root = tmp_path_factory.mktemp("fuzz")
    folder = create_run(root, "run", values)
    path = folder / "config.json"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    else:
        whole = json.loads(path.read_text())
        known = {"text": vars(options.text), "model": SHAPE, "training": vars(options.training)}.get(part)
        changed = VALUES if known is None else VALUES | st.dictionaries(st.sampled_from(list(known)), VALUES)
        path.write_text(json.dumps(whole | {part: data.draw(changed)}))
    with refused_or_read(root):
        saved_options(folder)


@FUZZ
@given(content=damaged(b'device = "cpu"\n[text]\ndata = "stdlib"\n[model]\nd_model = 64\n[training]\nsteps = 3\n'))
def test_toml(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "x.toml").write_bytes(content)
    with refused_or_read(folder):
        merge(Options(), read_toml(folder / "x.toml"), "x.toml")


@settings(FUZZ, max_examples=150)
@given(values=st.dictionaries(st.sampled_from(list(vars(TrainConfig()))), VALUES))
def test_training_options(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    with refused_or_read(tmp_path_factory.mktemp("fuzz")):
        merge(TrainConfig(), values, "x.toml")


@pytest.mark.parametrize("name", ["config.json", "checkpoint.json", "manifest.json", "x.toml", "tokenizer.json"])
def test_nesting_without_end(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"x = {DEEP}" if name == "x.toml" else DEEP)
    readers = (load_config, saved_options, describe_checkpoint, open_corpus, lambda path: load_tokenizer(str(path)))
    for read in (*readers, lambda path: read_toml(path / "x.toml")):
        with refused_or_read(tmp_path):
            read(tmp_path)
    with refused_or_read(tmp_path):
        LanguageModelConfig.from_json(DEEP)

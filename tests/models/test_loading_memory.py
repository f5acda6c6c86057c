"""Loading takes little more memory than the weights: files are mapped, the model is built on the meta device."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longscan.models import LanguageModel, LanguageModelConfig
from longscan.nn.storage import load_tensors, save_tensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# What a process holds beyond its imports: at its peak, with every weight read, in bytes.
LOAD = """
import sys
import safetensors.torch, torch
from longscan.models import LanguageModel

def held(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def read(folder):
    model = LanguageModel.from_pretrained(folder)
    return model, sum(float(tensor.view(-1)[::512].float().sum()) for tensor in model.state_dict().values())

# A small model brings in what PyTorch imports when it is first used.
read(sys.argv[2])
before = held("VmRSS")
model = read(sys.argv[1])
print(held("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Of 100 MB, spread over many tensors, none of which is a large part of it."""
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(d_model=512, n_layer=12, vocab_size=8192))


def shard(folder: Path) -> None:
    """Cut the folder's one file of weights in three, with an index, as Transformers does."""
    path = folder / "model.safetensors"
    tensors, _ = load_tensors(path)
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_tensors(folder / place, {name: tensors[name] for name in tensors if places[name] == place}, {})
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def save(model: LanguageModel, folder: Path, layout: str) -> None:
    if layout == "int8":
        copy.deepcopy(model).quantize().save_pretrained(folder)
    else:
        model.save_pretrained(folder, "transformers" if layout == "shards" else layout)
    if layout == "shards":
        shard(folder)


@pytest.mark.parametrize("layout", ["longscan", "transformers", "shards", "mamba-ssm", "int8"])
def test_peak(layout: str, model: LanguageModel, tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    save(model, large, layout)
    save(LanguageModel(LanguageModelConfig(d_model=8, n_layer=1)), small, layout)
    files = [path for kind in ("*.safetensors", "*.bin") for path in large.glob(kind)]
    size = sum(path.stat().st_size for path in files)
    assert size > (20e6 if layout == "int8" else 80e6)
    command = [sys.executable, "-c", LOAD, str(large), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    assert 0.9 * size < peak < 1.2 * size

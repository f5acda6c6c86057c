"""`longscan bench loading`: the most memory that a process holds while it reads a model, over its weights' size."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from longscan.bench.contest import Settings, describe, failure
from longscan.bench.models import make_model, shapes_of
from longscan.bench.report import Report, Row
from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.nn.storage import load_tensors, save_tensors

AXES = "layers,d_model,vocabulary"

#: What a folder can hold: ours, Transformers' in one file and in three, mamba-ssm's, and int8 weights.
LAYOUTS = ("longscan", "transformers", "shards", "mamba-ssm", "int8")

# Prints what a process holds at its peak beyond its imports, with every weight read, in bytes.
_PROBE = """
import sys, torch

def held(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

def read(folder):
    model = load(folder)
    return model, sum(float(tensor.view(-1)[::512].float().sum()) for tensor in model.state_dict().values())

if sys.argv[1] == "longscan":
    from longscan.models import LanguageModel
    load = LanguageModel.from_pretrained
else:
    from transformers import AutoModelForCausalLM
    load = AutoModelForCausalLM.from_pretrained
# A small model brings in what PyTorch imports when it is first used.
small = read(sys.argv[3])
before = held("VmRSS")
large = read(sys.argv[2])
print(held("VmHWM") - before)
"""


def run(settings: Settings) -> Report:
    """The 130M model in float32 (516 MB) in every layout, each read by a process of its own.

    Every weight is read once, so that mapped files are in memory. Beside it Transformers, reading its own layout.

    Raises:
        ArgumentError: the device is not the CPU, or the system has no /proc.
    """
    if settings.device != "cpu" or sys.platform != "linux":
        raise ArgumentError("device: resident memory is read from /proc, of a process on the CPU of a Linux system")
    shapes = shapes_of(settings, AXES, (24, 768, 50277))
    rows: list[Row] = []
    for shape in shapes:
        layers, d_model, vocabulary = shape
        model = make_model(layers, d_model, vocabulary, torch.float32, "cpu", settings.seed)
        for layout in LAYOUTS:
            loaders = ("longscan", *settings.peers_of(*(("transformers",) if layout == "transformers" else ())))
            with tempfile.TemporaryDirectory() as folder:
                save(model, Path(folder) / "large", layout)
                save(LanguageModel(LanguageModelConfig(d_model=8, n_layer=1)), Path(folder) / "small", layout)
                rows += [_row(loader, Path(folder), describe(shape, layout), settings) for loader in loaders]
    about = {"device": "cpu", "axes": AXES, "shapes": shapes}
    return Report("loading", "times the weights", higher_is_better=False, rows=rows, settings=about)


def _row(loader: str, folder: Path, group: str, settings: Settings) -> Row:
    settings.progress(f"{group}: {loader}")
    kind = "ours" if loader == "longscan" else "peer"
    try:
        peak = peak_of_loading(folder / "large", folder / "small", loader)
    except subprocess.CalledProcessError as error:
        return Row(group, loader, kind, note=failure(RuntimeError(error.stderr[-200:])))
    return Row(group, loader, kind, value=peak / size_of(folder / "large"), memory=peak)


def peak_of_loading(large: Path, small: Path, loader: str = "longscan") -> int:
    """Bytes that a process holds at most while it reads the one folder, beyond what it holds after the other.

    Args:
        loader: "longscan" or "transformers".
    """
    command = [sys.executable, "-c", _PROBE, loader, str(large), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def size_of(folder: Path) -> int:
    """Bytes of its files of weights."""
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def save(model: LanguageModel, folder: Path, layout: str) -> None:
    """Write a model in one of the layouts."""
    if layout == "int8":
        copy.deepcopy(model).quantize().save_pretrained(folder)
    else:
        model.save_pretrained(folder, "transformers" if layout == "shards" else layout)
    if layout == "shards":
        _shard(folder)


def _shard(folder: Path) -> None:
    """Cut the folder's one file of weights in three, with an index, as Transformers does."""
    path = folder / "model.safetensors"
    tensors, _ = load_tensors(path)
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_tensors(folder / place, {name: tensors[name] for name in tensors if places[name] == place}, {})
    path.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

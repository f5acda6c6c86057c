"""Models as folders, written whole or not at all: ours, and those of mamba-ssm and Transformers (:mod:`formats`)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError, CheckpointError, ConfigError
from longscan.models import formats
from longscan.models.config import LanguageModelConfig
from longscan.nn.storage import load_pickled, load_tensors, save_pickled, save_tensors, write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"

# The key of ours that says how weights are quantised; absent where they are not.
QUANTIZATION = "quantization"

# Names of what a model with tied embeddings shares.
_EMBEDDING, _HEAD = "backbone.embedding.", "lm_head."

M = TypeVar("M", bound=nn.Module)


def save_pretrained(model: Any, folder: str | os.PathLike[str], kind: str = "longscan") -> Path:
    """Write the configuration and the weights of a model in one of :data:`formats.FORMATS`.

    Raises:
        ConfigError: the format cannot say what the model is (:mod:`formats`), or holds no int8 weights.
        StorageError: a file could not be written; what was there before is untouched.
    """
    folder = Path(folder)
    values = formats.write_config(model.config, kind)
    if model.quantization is not None:
        if kind != "longscan":
            raise ConfigError(f"format {kind!r} has no {model.quantization} weights; save it before it is quantised")
        values[QUANTIZATION] = model.quantization
    tensors = formats.rename(model.state_dict(), kind, out=True)
    if kind == "mamba-ssm":
        save_pickled(folder / PICKLED_FILE, tensors)
    else:
        if model.config.tie_embeddings:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)}
        save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_text(folder / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
    return folder


def load_pretrained(
    kind: type[M],
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    subfolder: str = "",
) -> M:
    """Build the model a folder describes, on the meta device, and give it the weights.

    Raises:
        ArgumentError: ``dtype`` is none of PyTorch's floating ones.
        CheckpointError: a file is missing, damaged or truncated, or the weights do not fit the configuration.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype must be a floating dtype such as torch.bfloat16, got {dtype!r}")
    folder = find_folder(source, revision, subfolder)
    values = read_json(folder / CONFIG_FILE)
    quantization = values.pop(QUANTIZATION, None)
    config = _config_of(values, folder / CONFIG_FILE)
    try:
        with torch.device("meta"):
            model: Any = kind(config)
    except (ArgumentError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    if quantization is not None:
        try:
            model.quantize(quantization)
        except ArgumentError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {QUANTIZATION}: {error}") from error
    tensors, path = read_weights(folder, device)
    load_weights(model, formats.rename(tensors, formats.recognise(values), out=False), path)
    loaded: M = model if dtype is None else model.to(dtype)
    return loaded


def find_folder(source: str | os.PathLike[str], revision: str | None = None, subfolder: str = "") -> Path:
    """The folder itself, or, for the name of a repository on the Hugging Face Hub, its copy here (downloaded once).

    Args:
        source: a folder or a repository.
        revision: of the repository.
        subfolder: where in it the model is.

    Raises:
        CheckpointError: there is no such folder, and no such repository within reach.
    """
    folder = Path(source, subfolder)
    if folder.is_dir():
        return folder
    if Path(source).is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"{folder}: no such folder; a saved model is a folder with {CONFIG_FILE} and weights, or the name of a "
            "repository on the Hugging Face Hub, such as state-spaces/mamba-130m"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{source}: no such folder; to look on the Hugging Face Hub, install longscan[hub]"
        ) from None
    inside = f"{subfolder}/" if subfolder else ""
    try:
        for kind in ("safetensors", "bin"):
            copy = snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=[f"{inside}*.json", f"{inside}*.{kind}"],
                # Repositories keep other models in folders of theirs.
                ignore_patterns=[f"{inside}*/*"],
            )
            found = Path(copy, subfolder)
            if any((found / name).is_file() for name in (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json")):
                break
    except Exception as error:  # of the network, the hub or its client, of many kinds
        raise CheckpointError(f"{source}: no such folder, and the Hugging Face Hub gives none: {error}") from error
    return found


def load_config(folder: Path) -> LanguageModelConfig:
    """Read the configuration of a saved model."""
    path = folder / CONFIG_FILE
    return _config_of(read_json(path), path)


def _config_of(values: dict[str, Any], path: Path) -> LanguageModelConfig:
    try:
        return formats.read_config(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # Another format's values, of another kind than it says.
        raise CheckpointError(f"{path}: a value is of the wrong kind: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration, of any format, as it stands.

    Raises:
        CheckpointError: the file is missing, damaged or holds no mapping.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected a mapping of names to values")
    # The configuration of a training run holds its model's beside other things.
    return values["model"] if isinstance(values.get("model"), dict) else values


def read_weights(folder: Path, device: torch.device | str | None) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a folder, whole or in shards, as they are named there, and the file that names them.

    Raises:
        CheckpointError: there are none, or a file is missing, damaged or truncated.
    """
    for name, load in ((WEIGHTS_FILE, _load_tensors), (PICKLED_FILE, load_pickled)):
        if (folder / name).is_file():
            return load(folder / name, device), folder / name
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise CheckpointError(f"{index}: has no weight_map of names to files")
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(shards.values())):
                if Path(shard).name != shard:
                    raise CheckpointError(f"{index}: names {shard!r}, which is not a file of its folder")
                tensors.update(load(folder / shard, device))
            return tensors, index
    raise CheckpointError(f"{folder}: no weights; expected {WEIGHTS_FILE} or {PICKLED_FILE}, or an index of shards")


def _load_tensors(path: Path, device: torch.device | str | None) -> dict[str, Tensor]:
    return load_tensors(path, device)[0]


def load_weights(model: Any, tensors: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Give a model of any device, also meta, the tensors of a file as its parameters.

    Raises:
        CheckpointError: keys are missing or unknown, or shapes do not fit; the message names ``source`` and the keys.
    """
    tensors = dict(tensors)
    if model.config.tie_embeddings:
        shared = {name: tensor for name, tensor in tensors.items() if name.startswith(_EMBEDDING)}
        tensors.update((_HEAD + name.removeprefix(_EMBEDDING), tensor) for name, tensor in shared.items())
    assign_weights(model, tensors, source)
    model.tie_weights()


def assign_weights(model: nn.Module, tensors: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Make tensors the parameters and buffers of a model of any device, also meta.

    Raises:
        CheckpointError: keys are missing or unknown, or shapes do not fit; the message names ``source`` and the keys.
    """
    expected: dict[str, Tensor] = model.state_dict()
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    faults = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("shapes", wrong))
        if names
    ]
    if faults:
        raise CheckpointError(f"{source} does not fit the model's configuration; {'; '.join(faults)}")
    marks = {name: dict(vars(tensor)) for name, tensor in _named_tensors(model)}
    for name, mark in marks.items():
        # Others save all weights in one dtype.
        if mark.get("_keep_float32") and name in tensors and tensors[name].dtype in (torch.bfloat16, torch.float16):
            tensors[name] = tensors[name].float()
    model.load_state_dict(tensors, assign=True)
    # Assigning makes new tensors, without the marks (no weight decay, float32) of the old ones.
    for name, tensor in _named_tensors(model):
        vars(tensor).update(marks[name])


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

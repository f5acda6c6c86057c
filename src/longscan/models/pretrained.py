"""Models as folders: ``config.json`` and ``model.safetensors``, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longscan.errors import CheckpointError, ConfigError
from longscan.models.config import LanguageModelConfig
from longscan.nn.storage import load_tensors, save_tensors, write_text

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

M = TypeVar("M", bound=nn.Module)


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write the configuration and the weights of a model.

    Raises:
        StorageError: a file could not be written; what was there before is untouched.
    """
    folder = Path(folder)
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_text(folder / CONFIG_FILE, model.config.to_json())
    return folder


def load_pretrained(
    kind: type[M],
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> M:
    """Build the model a folder describes, on the meta device, and give it the weights.

    Raises:
        CheckpointError: a file is missing, damaged or truncated, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; a saved model is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = load_config(folder)
    with torch.device("meta"):
        model = kind(config)
    tensors, _ = load_tensors(folder / WEIGHTS_FILE, device)
    load_weights(model, tensors, folder / WEIGHTS_FILE)
    return model if dtype is None else model.to(dtype)


def load_config(folder: Path) -> LanguageModelConfig:
    """Read the configuration of a saved model."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # The configuration of a training run holds its model's beside other things.
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values = values["model"]
        return LanguageModelConfig.from_dict(values)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ConfigError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_weights(model: Any, tensors: dict[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Give a model of any device, also meta, the tensors of a file as its parameters.

    Raises:
        CheckpointError: keys are missing or unknown, or shapes do not fit; the message names ``source`` and the keys.
    """
    tensors = dict(tensors)
    if model.config.tie_embeddings and "backbone.embedding.weight" in tensors:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
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
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    # Assigning makes new parameters, without the marks (no weight decay, float32) of the old ones.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        vars(parameter).update(marks[name])


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

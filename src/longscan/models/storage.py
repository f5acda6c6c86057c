"""Folders of models that are no language models: a configuration and weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from longscan.errors import CheckpointError, ConfigError
from longscan.models.options import Config
from longscan.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, assign_weights, read_json
from longscan.nn.storage import load_tensors, save_tensors, write_text

M = TypeVar("M", bound=nn.Module)


def save_model(model: Any, folder: str | os.PathLike[str], kind: str) -> Path:
    """Write weights and configuration of a model with a ``config``; ``kind`` is what the file says it is of.

    Raises:
        StorageError: a file could not be written; what was there before is untouched.
    """
    folder = Path(folder)
    save_tensors(folder / WEIGHTS_FILE, model.state_dict(), {"format": "pt"})
    write_text(folder / CONFIG_FILE, json.dumps({"model_type": kind, **model.config.to_dict()}, indent=2) + "\n")
    return folder


def load_model(
    cls: type[M],
    config: type[Config],
    folder: str | os.PathLike[str],
    kind: str,
    device: torch.device | str | None = None,
) -> M:
    """Read what :func:`save_model` wrote.

    Raises:
        CheckpointError: a file is missing, damaged or truncated, or of another model.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path)
    found = values.pop("model_type", None)
    if found != kind:
        raise CheckpointError(f"{path}: model_type: got {found!r}, expected {kind!r}")
    try:
        shape = config.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = cls(shape)
    weights = Path(folder) / WEIGHTS_FILE
    tensors, _ = load_tensors(weights, device)
    assign_weights(model, tensors, weights)
    return model

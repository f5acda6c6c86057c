"""Models that are no language models, as folders: a configuration and weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from longscan.errors import CheckpointError, ConfigError
from longscan.models.options import Config
from longscan.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, assign_weights, read_json
from longscan.nn.storage import load_tensors, save_tensors, write_text

M = TypeVar("M", bound="StoredModel")


class StoredModel(nn.Module):
    """Base of a model that is made from a ``config`` alone, ``Model(config)``; written to and read from folders."""

    #: The class of ``config``.
    config_type: ClassVar[type[Config]]

    #: What the configuration file says that it is of.
    model_type: ClassVar[str]

    config: Any

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``config.json`` and ``model.safetensors``; a write that fails leaves the old files untouched.

        Raises:
            StorageError: a file could not be written.
        """
        folder = Path(folder)
        values = {"model_type": self.model_type, **self.config.to_dict()}
        save_tensors(folder / WEIGHTS_FILE, self.state_dict(), {"format": "pt"})
        write_text(folder / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls: type[M], folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> M:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            CheckpointError: a file is missing, damaged or truncated, or of another model.
        """
        path = Path(folder) / CONFIG_FILE
        values = read_json(path)
        found = values.pop("model_type", None)
        if found != cls.model_type:
            raise CheckpointError(f"{path}: model_type: got {found!r}, expected {cls.model_type!r}")
        try:
            config = cls.config_type.from_dict(values)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        with torch.device("meta"):
            model = cls(config)
        weights = Path(folder) / WEIGHTS_FILE
        tensors, _ = load_tensors(weights, device)
        assign_weights(model, tensors, weights)
        return model

"""`mamba_ssm.utils.hf`: configuration and weights of a saved model, of any format that longscan reads."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from longscan.models import formats
from longscan.models.pretrained import CONFIG_FILE, find_folder, read_json, read_weights


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """The keyword arguments of `MambaConfig` for a folder, or a repository on the Hugging Face Hub.

    Raises:
        CheckpointError: there is no such model, or its configuration is damaged.
        ConfigError: it is a model of another format that mamba-ssm's configuration cannot describe.
    """
    values = read_json(find_folder(model_name) / CONFIG_FILE)
    if formats.recognise(values) == "mamba-ssm":
        return values
    return formats.write_config(formats.read_config(values), "mamba-ssm")


def load_state_dict_hf(
    model_name: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """A model's tensors under mamba-ssm's names, on `device` and in `dtype`; nothing but tensors is unpickled.

    Raises:
        CheckpointError: there is no such model, or a file is missing, damaged or truncated.
    """
    folder = find_folder(model_name)
    values = read_json(folder / CONFIG_FILE)
    tensors, _ = read_weights(folder, None)
    tensors = formats.rename(tensors, formats.recognise(values), out=False)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}

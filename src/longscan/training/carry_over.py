"""A classifier that starts from the layers of a language model: pretraining on sequences, then naming them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from longscan.errors import CheckpointError
from longscan.models import Classifier
from longscan.nn.storage import load_tensors
from longscan.training.tasks import TaskModel

_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(norm2?|mixer|mlp)\.(.+)")


@torch.no_grad()
def carry_over(path: Path, model: TaskModel) -> None:
    """Give a classifier the embedding, layers and last norm of a language model; its decoder stays as it is.

    Args:
        path: a checkpoint of :class:`longscan.training.tasks.TaskTrainer`.
        model: a classifier in one direction, of the same mixers and widths, with RMS norms before its branches.

    Raises:
        CheckpointError: the file is damaged, or its layers are not the classifier's.
    """
    tensors, _ = load_tensors(path)
    of_model = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
    branches = 2 if any(".mlp." in name for name in of_model) else 1
    theirs = {_name(name, branches): value for name, value in of_model.items()}
    wanted = {name: own for name, own in model.named_parameters() if not name.startswith("decoder.")}
    config = model.config if isinstance(model, Classifier) else None
    fits = config is not None and (config.norm, config.prenorm, config.direction) == ("rms", True, "forward")
    if "encoder.weight" in theirs and "encoder.weight" in wanted:
        # A language model's vocabulary is filled up to a round number.
        theirs["encoder.weight"] = theirs["encoder.weight"][: len(wanted["encoder.weight"])]
    other = [name for name, own in wanted.items() if name not in theirs or theirs[name].shape != own.shape]
    other += [name for name in theirs if name not in wanted and not name.startswith("lm_head")]
    if not fits or other:
        what = f"{other[0]} is not the same" if fits else "it needs norm 'rms', prenorm and direction 'forward'"
        raise CheckpointError(f"{path}: its layers are not those of the classifier that is to start from them: {what}")
    for name, own in wanted.items():
        own.copy_(theirs[name])


def _name(name: str, branches: int) -> str:
    """A classifier's name for a language model's parameter."""
    name = name.replace("backbone.embedding.", "encoder.").replace("backbone.norm_f.", "norm.")
    if not (match := _LAYER.fullmatch(name)):
        return name
    layer, part, rest = match.groups()
    place = branches * int(layer) + (part in ("norm2", "mlp"))
    return f"stacks.0.layers.{place}.{'norm' if part.startswith('norm') else 'branch'}.{rest}"

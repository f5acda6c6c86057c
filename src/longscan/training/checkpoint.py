"""Checkpoints: folders that are whole or not there, checked when they are read."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.errors import CheckpointError, StorageError
from longscan.models import LanguageModel
from longscan.models.pretrained import load_weights
from longscan.nn.state import ModelState
from longscan.nn.storage import load_tensors, save_tensors
from longscan.training.distributed import Ranks
from longscan.training.optimizers import Optimizers

_FORMAT = 1
_ABOUT = "checkpoint.json"
_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"


def save_weights(model: LanguageModel, path: Path) -> None:
    """Write a model's weights, tied ones once, as one file."""
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    save_tensors(path, tensors, {"format": "pt"})


def save_checkpoint(
    root: Path,
    step: int,
    model: LanguageModel,
    optimizers: Optimizers,
    states: list[ModelState] | None,
    progress: dict[str, Any],
    *,
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write ``root/step-N``: to a hidden folder first, flushed to the disk, then renamed; then delete old ones.

    Every process calls this: the first writes model, optimisers, random numbers and ``progress``, each its own states.

    Raises:
        StorageError: the disk refused; checkpoints written before are untouched.
    """
    final = root / f"step-{step:08d}"
    building = root / f".{final.name}.tmp"
    try:
        if ranks.first:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        ranks.wait()
        for index, state in enumerate(states or []):
            state.save(building / f"state-{ranks.rank}-{index}.safetensors")
        if ranks.first:
            save_weights(model, building / _WEIGHTS)
            save_tensors(building / _OPTIMIZER, optimizers.tensors(), {})
        ranks.wait()
        if ranks.first:
            about = {
                "format": _FORMAT,
                "step": step,
                "processes": ranks.size,
                "random": _random_numbers(),
                "progress": progress,
                "sha256": {path.name: _digest(path) for path in sorted(building.iterdir())},
            }
            about["self"] = _own_digest(about)
            (building / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            for path in (*building.iterdir(), building):
                _flush(path)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(building, final)
            _flush(root)
            for _, old in list_checkpoints(root)[keep:]:
                _discard(old)
        ranks.wait()
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise StorageError(
            f"cannot write the checkpoint {final}: {error}; earlier checkpoints are untouched"
        ) from error
    return final


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints below a folder, newest first."""
    found = []
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def newest_sound(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole (None: there is none), and what is wrong with newer ones."""
    faults = []
    for _, path in list_checkpoints(root):
        try:
            describe_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, after all its files were compared with their checksums.

    Raises:
        CheckpointError: a file is missing or changed; the message names it.
    """
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        digests = dict(about["sha256"])
        if about.pop("self") != _own_digest(about):
            raise ValueError("its contents do not match the checksum written with them")
        if about["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {about['format']}, this version reads {_FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _ABOUT} is damaged or missing: {error}") from error
    for name, expected in digests.items():
        try:
            found = _digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing or unreadable: {error.strerror or error}") from error
        if found != expected:
            raise CheckpointError(f"{path / name} is damaged: its contents do not match the checksum written with it")
    return dict(about)


def load_checkpoint(
    path: Path, model: LanguageModel, optimizers: Optimizers, *, ranks: Ranks, device: torch.device
) -> tuple[int, list[ModelState] | None, dict[str, Any]]:
    """Put model, optimisers and random numbers back to where :func:`save_checkpoint` found them.

    Returns:
        Steps done, the carried states (None if there were none), and ``progress``.

    Raises:
        CheckpointError: it is damaged, or of another model, optimiser or number of processes.
    """
    about = describe_checkpoint(path)
    states = [
        ModelState.load(path / name).to(device)
        for name in sorted(about["sha256"])
        if name.startswith(f"state-{ranks.rank}-")
    ]
    if any(name.startswith("state-") for name in about["sha256"]) and about["processes"] != ranks.size:
        raise CheckpointError(
            f"{path} carries the states of {about['processes']} processes, here are {ranks.size}; start as many"
        )
    tensors, _ = load_tensors(path / _WEIGHTS)
    _copy_weights(model, tensors, path / _WEIGHTS)
    optimizers.load_tensors(load_tensors(path / _OPTIMIZER)[0], path / _OPTIMIZER)
    _set_random_numbers(about["random"])
    return int(about["step"]), states or None, dict(about["progress"])


def _copy_weights(model: LanguageModel, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy into the parameters that are there: the optimisers and a compiled model hold on to them."""
    with torch.device("meta"):
        loaded = LanguageModel(model.config)
    load_weights(loaded, tensors, source)
    model.load_state_dict(loaded.state_dict())


def _random_numbers() -> dict[str, Any]:
    def text(state: Tensor) -> str:
        return base64.b64encode(state.cpu().numpy().tobytes()).decode()

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": text(torch.get_rng_state()), "cuda": [text(state) for state in cuda]}


def _set_random_numbers(saved: dict[str, Any]) -> None:
    def state(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(state(saved["cpu"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state(text) for text in saved["cuda"]])


def _own_digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


def _flush(path: Path) -> None:
    """Make a file or a folder's list of names survive a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves no half of one under its name."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)

"""Folders of checkpoints: each is whole or not there, and compared with its checksums when it is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longscan.errors import CheckpointError
from longscan.nn.storage import file_digest, flush, json_digest
from longscan.training.distributed import Ranks

_ABOUT = "checkpoint.json"
# 2: in shards, one or more per process. Versions that know only 1 refuse it in words.
_FORMATS = (1, 2)


def place(root: Path, step: int) -> tuple[Path, Path]:
    """Where a checkpoint is to be, and the hidden folder in which it is built."""
    final = root / f"step-{step:08d}"
    return final, root / f".{final.name}.tmp"


def seal(building: Path, final: Path, about: dict[str, Any], digests: dict[str, str]) -> None:
    """Complete a checkpoint: what it says of itself is written, all of it flushed to the disk, then it gets its name.

    Args:
        building: with all files in it.
        final: takes the place of what has this name.
        about: JSON values, with "format".
        digests: of the files, by name (:func:`longscan.nn.storage.file_digest`).
    """
    about = {**about, "sha256": dict(sorted(digests.items()))}
    about["self"] = json_digest(about)
    (building / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for path in (*building.iterdir(), building):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(building, final)
    flush(final.parent)


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints below a folder, newest first."""
    found = []
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def keep_only(root: Path, last: int, others: Iterable[int] = ()) -> None:
    """Delete all checkpoints but the last so many, and those of some other steps."""
    others = set(others)
    for step, path in list_checkpoints(root)[last:]:
        if step not in others:
            # Under another name first: a kill in between leaves no half of one under its own.
            hidden = path.with_name(f".{path.name}.old")
            os.rename(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what killed processes have left half built or half deleted."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def newest_sound(root: Path, ranks: Ranks | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole (None: there is none), and what is wrong with newer ones.

    Several processes share the reading, and come to one answer.
    """
    ranks = ranks or Ranks()
    faults: list[str] = []
    for name in ranks.share([path.name for _, path in list_checkpoints(root)]):
        found = [fault for fault in ranks.gather(_fault(root / name, ranks)) if fault is not None]
        if not found:
            return root / name, faults
        faults.append(found[0])
    return None, faults


def _fault(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, as far as this process looks."""
    try:
        describe_checkpoint(path, ranks)
    except CheckpointError as error:
        return str(error)
    return None


def describe_checkpoint(path: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """What a checkpoint says of itself, after its files were compared with their checksums.

    Args:
        path: its folder.
        ranks: of several processes, each compares its share of the files.

    Raises:
        CheckpointError: a file is missing or changed; the message names it.
    """
    ranks = ranks or Ranks()
    about = read_about(path)
    for name in sorted(about["sha256"])[ranks.rank :: ranks.size]:
        try:
            found = file_digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing or unreadable: {error.strerror or error}") from error
        if found != about["sha256"][name]:
            raise CheckpointError(f"{path / name} is damaged: its contents do not match the checksum written with it")
    return about


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; its other files are not looked at.

    Raises:
        CheckpointError: the file that says it is missing or changed.
    """
    try:
        about = dict(json.loads((path / _ABOUT).read_text(encoding="utf-8")))
        if about.pop("self") != json_digest(about):
            raise ValueError("its contents do not match the checksum written with them")
        if about["format"] not in _FORMATS:
            allowed = " and ".join(map(str, _FORMATS))
            raise CheckpointError(f"{path} has format {about['format']}, this version reads {allowed}")
        if any(Path(name).name != name for name in about["sha256"]):
            raise ValueError("it names a file that is not in its folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / _ABOUT} is damaged or missing: {error}") from error
    return about

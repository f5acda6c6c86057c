"""A run's folder: made whole with its configuration, found again, never mistaken for something else."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longscan.errors import ConfigError, StorageError
from longscan.models import LanguageModelConfig
from longscan.models.pretrained import CONFIG_FILE
from longscan.nn.storage import write_text

#: What a finished run measured on the held-out part, and what its model wrote.
HELD_OUT_FILE = "held_out.json"
SAMPLE_FILE = "sample.txt"

_FORMAT = 1


def check_name(name: str) -> None:
    """Raise ConfigError unless a run can have this name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise ConfigError(f"name must be a plain folder name, got {name!r}")


def create_run(root: Path, name: str, config: dict[str, Any], *, exact: bool = False) -> Path:
    """Make ``root/name`` (or ``name-2``, ``name-3``, ... if it is taken) with its ``config.json`` in one step.

    Raises:
        ConfigError: the name is no plain folder name, or it is taken and ``exact`` asks for no other.
        StorageError: the folder cannot be made.
    """
    check_name(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        building.chmod(0o755)
        try:
            write_text(building / CONFIG_FILE, json.dumps({"format": _FORMAT, **config}, indent=2) + "\n")
            number = 1
            while True:
                folder = root / (name if number == 1 else f"{name}-{number}")
                # Renaming onto an empty folder would succeed, so the name is looked at first.
                if not folder.exists():
                    try:
                        os.rename(building, folder)
                        return folder
                    except OSError as error:
                        # Another process was faster; a folder that is not empty is an error of its own kind.
                        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                            raise
                if exact:
                    raise ConfigError(
                        f"name: {folder} exists; go on with it by --resume {folder}, or take another name"
                    )
                number += 1
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise (
            error if isinstance(error, StorageError) else StorageError(f"cannot make a run in {root}: {error}")
        ) from error


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from training the same run meanwhile. A process that dies lets go.

    Raises:
        ConfigError: one does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder} is being trained by another process; stop it first") from None
        yield


def find_launched(root: Path, name: str, launch: str) -> Path | None:
    """The run called ``name``, ``name-2``, ... that a launch of several processes has made; None: it has made none."""
    for folder in sorted([root / name, *root.glob(f"{name}-*")]):
        try:
            if read_run(folder).get("launch") == launch:
                return folder
        except ConfigError:
            continue  # something else
    return None


def read_run(folder: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        ConfigError: the folder is not there or not a run, or no model is like its configuration.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; a run is a folder that `longscan train` has made")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"text", "model", "training"} <= config.keys():
            raise ValueError("it lacks what `longscan train` writes")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder} is not a run of `longscan train`: {path.name}: {error}") from error
    if config.get("format") != _FORMAT:
        raise ConfigError(f"{path} has format {config.get('format')}, this version reads {_FORMAT}")
    try:
        LanguageModelConfig.from_dict(config["model"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config

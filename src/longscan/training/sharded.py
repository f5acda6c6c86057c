"""Checkpoints in shards, by torch.distributed.checkpoint: written beside the training, read by any number of processes.

Each process writes what it holds as safetensors, and says in the file's header where in the whole tensors that lies.
Nothing is pickled to a file or unpickled from one (docs/decisions/0012-checkpoints-in-shards.md).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from longscan.errors import CheckpointError
from longscan.nn.state import State
from longscan.nn.storage import file_digest

#: Files of carried states begin so; they lie beside the shards.
STATES = "state-"


class _Writer(dcp.HuggingFaceStorageWriter):
    """Writes shards and this process's states; then the first process is given the checksums of all files."""

    def __init__(self, building: Path, states: Mapping[str, State], seal: Callable[[dict[str, str]], None]) -> None:
        super().__init__(str(building), save_distributed=True)
        self.per_thread_copy_ahead = 0  # all is in the CPU's memory; without it, no thread looks for a GPU
        self._building, self._states, self._seal = building, states, seal

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        written = {result.storage_data.relative_path for result in super().write_data(plan, planner).wait()}
        for name, state in self._states.items():
            state.save(self._building / name)
        files = sorted(written | self._states.keys())
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(
            [
                WriteResult(MetadataIndex(name), path.stat().st_size, file_digest(path))
                for name, path in ((name, self._building / name) for name in files)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._seal({result.index.fqn: result.storage_data for part in results for result in part})


class _Reader(dcp.HuggingFaceStorageReader):
    """Reads shards, and the files of one process, which are shards of their own; states beside them are left out."""

    def read_metadata(self) -> Metadata:
        metadata = super().read_metadata()
        names = {
            index.fqn
            for index, info in metadata.storage_data.items()
            if not Path(info.relative_path).name.startswith(STATES)
        }
        metadata.state_dict_metadata = {
            name: value for name, value in metadata.state_dict_metadata.items() if name in names
        }
        return metadata


def start_saving(
    building: Path,
    tensors: Mapping[str, Tensor],
    states: Mapping[str, State],
    seal: Callable[[dict[str, str]], None],
    group: Any,
) -> Future[Any]:
    """Copy tensors (DTensors too) and states to memory that nobody changes; write them while the caller goes on.

    Args:
        building: the folder, made if it is not there.
        tensors: by name, the same names in every process.
        states: of this process, by the names of their files.
        seal: called in the first process when all files of all processes are there, with their checksums.
        group: a process group over CPUs that nothing else uses meanwhile.

    Returns:
        Done when ``seal`` has returned; raises in every process what went wrong in any.
    """
    copies = {name: state.map(lambda tensor: tensor.detach().to("cpu", copy=True)) for name, state in states.items()}
    saving = dcp.async_save(dict(tensors), storage_writer=_Writer(building, copies, seal), process_group=group)
    assert isinstance(saving, Future)
    return saving


def stored_tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and dtypes of the tensors of a checkpoint, whatever processes wrote it."""
    try:
        metadata = _Reader(str(path)).read_metadata().state_dict_metadata
    except Exception as error:  # of safetensors, JSON and torch, of many kinds
        raise CheckpointError(f"{path} is damaged: its tensors cannot be listed: {error}") from error
    return {
        name: (value.size, value.properties.dtype)
        for name, value in metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


def read_into(path: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Fill tensors, whole or DTensors, with their parts of a checkpoint; names and shapes are known to fit.

    Args:
        group: a process group over CPUs; None in a process that is alone.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be in one process
        dcp.load(dict(tensors), storage_reader=_Reader(str(path)), process_group=group, no_dist=group is None)

"""Processes on this machine's CPUs that measure together: what benchmarks of several processes share."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Found = dict[str, Any]


def spawned(worker: Callable[..., Found], processes: int, *arguments: Any) -> list[Found]:
    """What ``worker(*arguments)`` returned in each of several processes of one group (gloo), JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (worker, folder, processes, arguments), nprocs=processes)
        return [json.loads((Path(folder) / f"found-{rank}").read_text()) for rank in range(processes)]


def _process(rank: int, worker: Callable[..., Found], folder: str, processes: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    (Path(folder) / f"found-{rank}").write_text(json.dumps(worker(*arguments)))
    dist.barrier()
    dist.destroy_process_group()

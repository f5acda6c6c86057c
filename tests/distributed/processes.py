"""Several processes of one machine, for tests: what each finds wrong comes back as text."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: A worker is given the groups by their sizes: the first processes of all.
Groups = dict[int, dist.ProcessGroup | None]
Worker = Callable[[Groups], list[str]]


def run(worker: Worker, folder: Path, sizes: tuple[int, ...]) -> list[str]:
    """What ``worker`` returned in every process; as many start as the largest size."""
    size = max(sizes)
    mp.spawn(_process, (worker, str(folder), sizes), nprocs=size)
    return [line for rank in range(size) for line in (folder / f"found-{rank}").read_text().splitlines()]


def _process(rank: int, worker: Worker, folder: str, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=max(sizes),
        timeout=timedelta(seconds=60),
    )
    try:
        groups = {size: dist.new_group(list(range(size))) for size in sizes}
        found = worker({size: group for size, group in groups.items() if rank < size})
    except Exception:
        # The others would wait for this process: they are ended when it ends.
        (Path(folder) / f"found-{rank}").write_text(traceback.format_exc())
        raise
    (Path(folder) / f"found-{rank}").write_text("\n".join(found))
    dist.barrier()
    dist.destroy_process_group()

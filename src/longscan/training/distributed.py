"""Processes that train together, as `torchrun` starts them. One process is the case of one rank."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from longscan.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.mean(value) * self.size

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=device)).item() > 0)

    def broadcast(self, value: float, device: torch.device) -> float:
        """The first process's number, in all processes."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.broadcast(tensor, 0)
        return float(tensor.item())

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def join(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that `torchrun` describes in the environment; alone without it.

    Args:
        device: "cpu" or "cuda"; each process takes the GPU of its local rank.

    Raises:
        ConfigError: the device is not there, or the environment is incomplete.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} was asked for, but torch finds no GPU here; use --device cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(), torch.device(device)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start the processes with torchrun"
        )
    own = torch.device(device)
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    torch.distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size()), own
    finally:
        torch.distributed.destroy_process_group()

"""Processes that train together, as `torchrun` starts them. One process is the case of one rank."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from longscan.errors import ConfigError

T = TypeVar("T")

# How long processes wait for the one that evaluates, or reads the text.
_PATIENCE = datetime.timedelta(hours=12)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train together."""

    rank: int = 0
    size: int = 1
    #: A process group over CPUs for words; tensors travel in the default one.
    words: Any = None

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

    def share(self, value: T) -> T:
        """The first process's value, in all processes."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, 0, group=self.words)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in all processes."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        torch.distributed.all_gather_object(values, value, group=self.words)
        return values

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier(self.words)


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
    if sys.platform == "linux" and launch_id() is not None:
        # Were the launcher killed, nobody else would end this process, and it would go on writing.
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
    own = torch.device(device)
    if own.type == "cuda":
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise ConfigError(f"process {local} of this machine finds no GPU of its own, here are {here}; start fewer")
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    # The launcher's store outlives the processes: those started anew must not meet the addresses of those before them.
    store, rank, size = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"attempt-{restarts()}", store)
    # Checkpoints are gathered on CPUs.
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        words = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), words), own
    finally:
        torch.distributed.destroy_process_group()


def launch_id() -> str | None:
    """What names this launch of `torchrun`, the same after it has started its processes anew; None without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    # Without --rdzv-id all launches are called "none"; they differ in the process that starts the others.
    return name if name != "none" else f"{socket.gethostname()}:{os.getppid()}"


def restarts() -> int:
    """How often `torchrun` has started the processes of this launch anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

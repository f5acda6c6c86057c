"""A layer's channels over several processes: each computes its own, on shards that DTensor keeps.

Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053, section 3): the first product of a layer is split by rows, the last
by columns, and what lies between is each channel's own matter. Parameters are DTensors, as `parallelize_module` leaves
them, so that FSDP2, torch.distributed.checkpoint and gradient clipping work on them; while the layer computes it sees
its shard as an ordinary tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module

from longscan.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class ChannelPlan:
    """How a layer's parameters are split by channel.

    Attributes:
        rows: parameter -> rows of the matrices that lie one below the other in it, each split evenly. Parameters that
            are in neither field stay whole.
        sums: linear layers whose input is split: each process adds its part to the output.
        between: those of ``sums`` whose output all channels read, in every process.
        sizes: attributes of the layer that count channels or heads: each process has its share.
    """

    rows: Mapping[str, tuple[int, ...]]
    sums: tuple[str, ...]
    between: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()

    def order(self, name: str, processes: int) -> Tensor:
        """The rows of a parameter in the order in which processes have them.

        Raises:
            ArgumentError: they cannot be divided evenly.
        """
        places, first = [], 0
        for rows in self.rows[name]:
            if rows % processes:
                raise ArgumentError(f"{name}: {rows} rows cannot be divided evenly over {processes} processes")
            places.append(torch.arange(first, first + rows).view(processes, -1))
            first += rows
        return torch.cat(places, dim=1).flatten()


def split_channels(layer: nn.Module, plan: ChannelPlan, mesh: DeviceMesh) -> None:
    """Split a layer over a mesh of one dimension, in place; every process has the same weights before.

    For calls of the layer, forward and backward; single steps (``mixer.step``) find shards where they want tensors.

    Raises:
        ArgumentError: channels cannot be divided evenly.
    """
    for name in plan.sizes:
        if getattr(layer, name) % mesh.size():
            raise ArgumentError(f"{name} must be a multiple of the {mesh.size()} processes, got {getattr(layer, name)}")
    styles: dict[str, ParallelStyle] = {
        name: _Summed(read_by_all=name in plan.between) for name in plan.sums if hasattr(layer, name)
    }
    # The layer itself last: its hooks are then the outer ones.
    parallelize_module(layer, mesh, styles)
    parallelize_module(layer, mesh, _ByChannel(plan))
    for name in plan.sizes:
        setattr(layer, name, getattr(layer, name) // mesh.size())


class _Summed(RowwiseParallel):
    """A linear layer split by columns. Where all channels read its output, their gradients are summed."""

    def __init__(self, read_by_all: bool) -> None:
        super().__init__(use_local_output=False)
        self._placement = Partial() if read_by_all else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        marks = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        module = super()._apply(module, device_mesh)
        for name, parameter in module.named_parameters():
            vars(parameter).update(marks[name])
        module.register_forward_hook(lambda _, __, output: output.to_local(grad_placements=[self._placement]))
        return module


class _ByChannel(ParallelStyle):
    """What lies between: the shards take the places of the parameters while the layer computes."""

    def __init__(self, plan: ChannelPlan) -> None:
        super().__init__()
        self._plan = plan

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        owners: list[tuple[nn.Module, str]] = []
        for name in self._plan.rows:
            path, _, own = name.rpartition(".")
            owner = module.get_submodule(path)
            parameter = getattr(owner, own)
            if parameter is None:
                continue
            ordered = parameter.detach()[self._plan.order(name, device_mesh.size()).to(parameter.device)]
            shards = nn.Parameter(distribute_tensor(ordered, device_mesh, [Shard(0)]), parameter.requires_grad)
            vars(shards).update(vars(parameter))
            owner.register_parameter(own, shards)
            owners.append((owner, own))
        kept: list[nn.Parameter | None] = []

        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            kept[:] = [owner._parameters[name] for owner, name in owners]
            for (owner, name), parameter in zip(owners, kept, strict=True):
                assert isinstance(parameter, DTensor)
                local = parameter.to_local()
                vars(local).update(vars(parameter))
                owner._parameters[name] = local
            # The same in every process; each gives a part of its gradient.
            x = DTensor.from_local(arguments[0], device_mesh, [Replicate()], run_check=False)
            return x.to_local(grad_placements=[Partial()]), *arguments[1:]

        def leave(*_: Any) -> None:
            for (owner, name), parameter in zip(owners, kept, strict=True):
                owner._parameters[name] = parameter

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
        return module


def undivided(split: Tensor, order: Tensor) -> DTensor:
    """A copy of a DTensor that is split by rows, over the same processes, with its rows where ``order`` has them from.

    Each process then has rows that follow one another, which is what checkpoints are made of. The whole is in memory
    meanwhile.
    """
    assert isinstance(split, DTensor)
    whole = split.full_tensor()
    whole = whole[torch.argsort(order).to(whole.device)]
    placements = [placement if placement.is_replicate() else Shard(0) for placement in split.placements]
    return distribute_tensor(whole, split.device_mesh, placements, src_data_rank=None)


def fill_from_undivided(split: Tensor, source: Tensor, order: Tensor) -> None:
    """The other way round: fill ``split`` from what is like :func:`undivided` of it."""
    assert isinstance(split, DTensor)
    assert isinstance(source, DTensor)
    whole = source.full_tensor()
    own = whole[order.to(whole.device)]
    mesh = split.device_mesh
    # Channels, the last dimension, were split first; FSDP2 has split each process's share again.
    for dimension in reversed(range(mesh.ndim)):
        if not split.placements[dimension].is_replicate():
            chunks, place = own.chunk(mesh.size(dimension)), mesh.get_local_rank(dimension)
            own = chunks[place] if place < len(chunks) else own[:0]
    with torch.no_grad():
        split.to_local().copy_(own)

"""How a model is laid over processes and memory: replicas or shards, recomputed layers, compiled layers."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from longscan.errors import ConfigError
from longscan.models import LanguageModel
from longscan.models.pretrained import load_weights
from longscan.nn.state import ModelState
from longscan.training.config import TrainConfig
from longscan.training.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Of torch.distributed, what one process never needs is imported where it is used.


class Loss(nn.Module):
    """A model's loss as a module's call: what wrappers of modules see."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState | None]:
        """Tokens, targets (batch, length) and the state before to the mean loss in nats, and the state after."""
        return self.model.loss_and_state(tokens, targets, state)


def lay_out(model: LanguageModel, config: TrainConfig, ranks: Ranks, device: torch.device) -> Any:
    """Ready a model for training as ``config`` says, in place.

    Parameters keep their names; with shards they are replaced by DTensors, so optimisers come after this.

    Returns:
        A module like :class:`Loss`, which exchanges gradients as it goes backward. With replicas it has ``no_sync``.
    """
    for block in model.backbone.blocks:
        # The method, not the module: names of parameters stay, and hooks of shards lie outside.
        if config.compile_blocks:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if config.recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if ranks.size > 1 and config.parallel == "fsdp":
        shard(model, shards_mesh(ranks, config.replicas, device))
        return Loss(model)
    loss = Loss(model)
    net = torch.compile(loss) if config.compile else loss
    return DistributedDataParallel(net, broadcast_buffers=False) if ranks.size > 1 else net


def shards_mesh(ranks: Ranks, replicas: int, device: torch.device) -> DeviceMesh:
    """All processes as (shards,) or, with several replicas, as (replicas, shards); neighbours share a replica.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if ranks.size % replicas:
        raise ConfigError(f"replicas must divide the processes; got {replicas} and {ranks.size} processes")
    sizes, names = (replicas, ranks.size // replicas), ("replicas", "shards")
    first = 0 if replicas > 1 else 1
    return init_device_mesh(device.type, sizes[first:], mesh_dim_names=names[first:])


def sequence_group(ranks: Ranks, size: int) -> Any:
    """The process group that shares this one's sequences, ``size`` neighbours; None if it shares none.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    if size == 1:
        return None
    if ranks.size % size:
        raise ConfigError(f"sequence_parallel must divide the processes; got {size} and {ranks.size} processes")
    firsts = range(0, ranks.size, size)
    groups = [torch.distributed.new_group(list(range(first, first + size))) for first in firsts]
    return groups[ranks.rank // size]


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split parameters, gradients and what optimisers keep over a mesh (FSDP2), one group a layer; over the last
    dimension of a mesh of two, of which the first has replicas.

    A layer's parameters are whole only while it computes. They travel and are added up in float32, and become bfloat16
    where autocast says so, as in one process: a group of one dtype would make A, D and the bias of dt bfloat16 too.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "loss_and_state")
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks[name])  # no weight decay, float32


def gather(model: LanguageModel, ranks: Ranks) -> LanguageModel | None:
    """A model that any code can use after training, of one that may be in shards; every process calls this.

    Returns:
        The model itself where it is whole (its layers are neither compiled nor recomputed any more), else a copy on the
        first process and None on the others.
    """
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        for block in model.backbone.blocks:
            vars(block).pop("forward", None)
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    if not ranks.first:
        return None
    device = model.device
    with torch.device("meta"):
        whole = LanguageModel(model.config)
    if model.config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    load_weights(whole, tensors, "the gathered model")
    return whole.to(device)

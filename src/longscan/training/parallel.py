"""How a model is laid over processes and memory: replicas, shards, channels; recomputed layers, compiled layers."""

from __future__ import annotations

import functools
import logging
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
    if ranks.size > 1 and (config.parallel == "fsdp" or config.tensor_parallel > 1):
        mesh = process_mesh(ranks, config, device)
        if config.tensor_parallel > 1:
            from longscan.models.tensor_parallel import tensor_parallel

            tensor_parallel(model, mesh["channels"])
        replicas, shards, _ = mesh.shape
        if replicas * shards > 1:
            dtype = torch.bfloat16 if config.gather_precision == "bfloat16" else None
            shard(model, mesh["replicas", "shards"] if replicas > 1 else mesh["shards"], dtype)
        return Loss(model)
    loss = Loss(model)
    net = torch.compile(loss) if config.compile else loss
    return DistributedDataParallel(net, broadcast_buffers=False) if ranks.size > 1 else net


def process_mesh(ranks: Ranks, config: TrainConfig, device: torch.device) -> DeviceMesh:
    """All processes as (replicas, shards, channels): neighbours share a layer's channels, then a replica's shards.

    DistributedDataParallel takes no layers that are split by channel: then "ddp" is replicas of one shard.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh

    # Norms of what is in shards and by channel are summed in two steps, which newer versions remark on.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    channels = config.tensor_parallel
    data = _divided("tensor_parallel", channels, ranks.size)
    replicas = config.replicas if config.parallel == "fsdp" else data
    sizes = replicas, _divided("replicas", replicas, data), channels
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicas", "shards", "channels"))


def sequence_group(ranks: Ranks, config: TrainConfig) -> Any:
    """The process group that shares this one's sequences; None if it shares none. Those between two of its neighbours
    have other channels of the same part.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    size, step = config.sequence_parallel, config.tensor_parallel
    if size == 1:
        return None
    _divided("sequence_parallel", size, _divided("tensor_parallel", step, ranks.size))
    members = [
        list(range(first + channel, first + size * step, step))
        for first in range(0, ranks.size, size * step)
        for channel in range(step)
    ]
    groups = [torch.distributed.new_group(own) for own in members]
    return next(group for group, own in zip(groups, members, strict=True) if ranks.rank in own)


def _divided(name: str, parts: int, processes: int) -> int:
    if processes % parts:
        raise ConfigError(f"{name} must divide the processes; got {parts} and {processes} processes")
    return processes // parts


def shard(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Split parameters, gradients and what optimisers keep over a mesh (FSDP2), one group a layer; over the last
    dimension of a mesh of two, of which the first has replicas.

    A layer's parameters are whole only while it computes. They travel in float32 and become bfloat16 where autocast
    says so, as in one process; or all in ``dtype``, even A, D and the bias of dt, since what FSDP2 gathers together has
    one dtype. What is kept, updated and summed over processes is float32 in any case.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Inputs are autocast's matter: the residual stream is not rounded between layers.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    marks = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
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

    from longscan.models.tensor_parallel import row_orders

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    if not ranks.first:
        return None
    tensors |= {name: tensors[name][torch.argsort(order)] for name, order in row_orders(model).items()}
    device = model.device
    with torch.device("meta"):
        whole = LanguageModel(model.config)
    if model.config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    load_weights(whole, tensors, "the gathered model")
    return whole.to(device)

"""A language model's layers by channel over processes (tensor parallelism), for Mamba, attention and MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from longscan.errors import ArgumentError
from longscan.mixers import Attention, Mamba
from longscan.models.language_model import LanguageModel
from longscan.nn.mlp import MLP, GatedMLP
from longscan.nn.tensor_parallel import ChannelPlan, fill_from_undivided, split_channels, undivided


def _mamba(mixer: Mamba) -> ChannelPlan:
    d = mixer.d_inner
    own = ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "A_imag", "D")
    return ChannelPlan(
        rows={"in_proj.weight": (d, d), "in_proj.bias": (d, d), **dict.fromkeys(own, (d,))},
        sums=("x_proj", "out_proj"),
        between=("x_proj",),
        sizes=("d_inner",),
    )


def _attention(mixer: Attention) -> ChannelPlan:
    heads = mixer.n_heads, mixer.n_kv_heads, mixer.n_kv_heads
    rows = tuple(number * mixer.head_dim for number in heads)
    return ChannelPlan(
        rows={"in_proj.weight": rows, "in_proj.bias": rows}, sums=("out_proj",), sizes=("n_heads", "n_kv_heads")
    )


def _gated_mlp(mlp: GatedMLP) -> ChannelPlan:
    rows = (mlp.fc2.in_features,) * 2
    return ChannelPlan(rows={"fc1.weight": rows}, sums=("fc2",))


def _mlp(mlp: MLP) -> ChannelPlan:
    rows = (mlp.fc2.in_features,)
    return ChannelPlan(rows={"fc1.weight": rows, "fc1.bias": rows}, sums=("fc2",))


#: Layer -> how its channels are split.
PLANS: dict[type[nn.Module], Callable[..., ChannelPlan]] = {
    Mamba: _mamba,
    Attention: _attention,
    GatedMLP: _gated_mlp,
    MLP: _mlp,
}


def tensor_parallel(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split the layers of a model by channel over a mesh of one dimension, in place.

    Every process calls it with the same weights, gives the model the same tokens and gets the same logits and loss.
    Embedding, norms and head stay whole in each. Go on with FSDP2 over another dimension of the mesh, if wanted, and
    make optimisers after both. A layer costs two sums over the processes forward (three in Mamba, the third of
    dt_rank + 2 N numbers a token) and as many backward, of d_model numbers a token.

    Raises:
        ArgumentError: a mixer that has no plan, or channels (heads) that cannot be divided evenly.

    Example:
        >>> mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("data", "model"))
        >>> tensor_parallel(model, mesh["model"])
        >>> for block in model.backbone.blocks:
        ...     fully_shard(block, mesh=mesh["data"])
        >>> fully_shard(model, mesh=mesh["data"])
    """
    if mesh.ndim != 1:
        raise ArgumentError(f"mesh must have one dimension, got {mesh.ndim}; take one by its name, mesh['model']")
    layers = list(_layers(model))
    for name, layer in layers:
        if type(layer) not in PLANS:
            known = ", ".join(kind.__name__ for kind in PLANS)
            raise ArgumentError(f"{name} is a {type(layer).__name__}, which has no plan; those of {known} can be split")
    orders = row_orders(model)
    for name, layer in layers:
        plan = PLANS[type(layer)](layer)
        there = dict(layer.named_parameters())
        orders.update({f"{name}.{own}": plan.order(own, mesh.size()) for own in plan.rows if own in there})
        split_channels(layer, plan, mesh)


def row_orders(model: LanguageModel) -> dict[str, Tensor]:
    """Of parameters that are split by rows: where in an undivided one their rows are. Of a whole model, none are."""
    orders: dict[str, Tensor] = vars(model).setdefault("_row_orders", {})
    return orders


def whole_state(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of a split model as an undivided one has them; all processes call it, and each gets them.

    Args:
        model: what :func:`tensor_parallel` has split, FSDP2 around it or not.
    """
    tensors = undivided_rows(model, model.state_dict())
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def undivided_rows(model: LanguageModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, or what an optimiser keeps of them (``anything/name``), with rows as in an undivided model: copies
    that are still in shards."""
    orders = row_orders(model)
    return {
        name: undivided(tensor, orders[_parameter(name)]) if _moved(name, tensor, orders) else tensor
        for name, tensor in tensors.items()
    }


def divide_rows(model: LanguageModel, tensors: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Fill tensors from what :func:`undivided_rows` made of them, and somebody else has filled meanwhile."""
    orders = row_orders(model)
    for name, tensor in tensors.items():
        if _moved(name, tensor, orders):
            fill_from_undivided(tensor, sources[name], orders[_parameter(name)])


def _parameter(name: str) -> str:
    return name.rpartition("/")[2]


def _moved(name: str, tensor: Tensor, orders: Mapping[str, Tensor]) -> bool:
    return tensor.ndim > 0 and _parameter(name) in orders


def _layers(model: LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    for number, block in enumerate(model.backbone.blocks):
        yield f"backbone.layers.{number}.mixer", block.mixer
        if block.mlp is not None:
            yield f"backbone.layers.{number}.mlp", block.mlp

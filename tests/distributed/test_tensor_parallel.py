"""Layers split by channel over processes give the outputs, the gradients and the weights of whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.models.config import TRANSFORMER
from longscan.models.tensor_parallel import row_orders, tensor_parallel, whole_state
from tests.distributed.processes import Groups, run

SHAPES = {
    "mamba": LanguageModelConfig(d_model=8, n_layer=2, vocab_size=32, d_intermediate=12),
    "mamba-biased": LanguageModelConfig(d_model=8, n_layer=1, vocab_size=32, mixer_options={"bias": True}),
    "mamba-complex": LanguageModelConfig(
        d_model=8, n_layer=1, vocab_size=32, mixer_options={"a_init": "s4d-lin", "d_state": 4}
    ),
    "attention": LanguageModelConfig(
        d_model=8,
        n_layer=2,
        vocab_size=32,
        mixer=("attention", "mamba"),
        mixer_options={"attention": {"n_heads": 8, "head_dim": 2, "n_kv_heads": 4, "bias": True}},
    ),
    "transformer": LanguageModelConfig(
        d_model=8,
        n_layer=1,
        vocab_size=32,
        **{**TRANSFORMER, "mixer_options": {"rotary": False, "n_heads": 4}, "prenorm": False, "d_intermediate": 12},
    ),
}


def make(shape: LanguageModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(shape).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def worker(groups: Groups) -> list[str]:
    found = []
    for name, shape in SHAPES.items():
        for sizes in ((2,), (4,), (2, 2)):
            ranks = torch.arange(int(torch.tensor(sizes).prod())).view(sizes)
            mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("data", "model")[-len(sizes) :])
            if dist.get_rank() < ranks.numel():
                found += [f"{name} over {sizes}: {what}" for what in compare(shape, mesh)]
            dist.barrier()
    return found


def compare(shape: LanguageModelConfig, mesh: DeviceMesh) -> list[str]:
    whole, model = make(shape), make(shape)
    tokens = torch.randint(32, (4, 7), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = whole.loss(inputs, targets)
    expected.backward()
    tensor_parallel(model, mesh["model"])
    orders = row_orders(model)
    marks = {name for name, parameter in model.named_parameters() if hasattr(parameter, "_no_weight_decay")}
    own = slice(None)
    if mesh.ndim == 2:
        own = slice(mesh["data"].get_local_rank() * 2, mesh["data"].get_local_rank() * 2 + 2)
        for block in model.backbone.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    # The call of the model, which FSDP2 watches.
    logits, _ = model(inputs[own])
    loss = F.cross_entropy(logits.flatten(0, 1), targets[own].flatten())
    loss.backward()
    loss = loss.detach()
    if mesh.ndim == 2:
        dist.all_reduce(loss, group=mesh.get_group("data"))
        loss /= 2
    found = [] if torch.allclose(loss, expected) else [f"the loss is {loss}, expected {expected}"]
    if marks != {name for name, parameter in whole.named_parameters() if hasattr(parameter, "_no_weight_decay")}:
        found.append("marks are lost")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        gradient = gradients[name]
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        if name in orders:
            gradient = gradient[torch.argsort(orders[name])]
        if not torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-11):
            found.append(f"the gradient of {name} differs by {(gradient - parameter.grad).abs().max():.1e}")
    state = whole_state(model)
    found += [f"{name} is not the same" for name, tensor in whole.state_dict().items() if not tensor.equal(state[name])]
    first = model.get_parameter("backbone.layers.0.mixer.in_proj.weight")
    if first.to_local().numel() * mesh.size() != first.numel():
        found.append("a process has more than its shard")
    return found


def test_split_layers_are_the_whole_ones(tmp_path: Path) -> None:
    found = run(worker, tmp_path, (4,))
    assert not found, "\n".join(found)


class Mesh:
    """Of three processes, as far as is asked before anything is split."""

    ndim = 1

    def size(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixer": "s4d"}, "S4D, which has no plan"), ({}, "rows cannot be divided evenly over 3 processes")],
)
def test_what_cannot_be_split_is_refused(options: dict[str, str], message: str) -> None:
    model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=32, **options))
    with pytest.raises(ArgumentError, match=message):
        tensor_parallel(model, Mesh())  # type: ignore[arg-type]

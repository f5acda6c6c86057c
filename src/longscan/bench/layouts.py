"""`longscan bench layouts`: what a training step sends and holds, by how the model is laid over processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.bench.contest import Settings, describe
from longscan.bench.models import make_model
from longscan.bench.report import Report, Row
from longscan.bench.spawned import spawned
from longscan.bench.train import make_batch
from longscan.errors import ArgumentError
from longscan.models import LanguageModel
from longscan.nn.sequence_parallel import current_part, sequence_parallel
from longscan.training import Ranks, TrainConfig
from longscan.training.parallel import lay_out
from longscan.training.stepper import autocast

# Operators of torch.distributed that send nothing, and messages, which parts of sequences count themselves.
_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "send", "recv_")

AXES = "processes,layers,d_model,vocabulary,batch,length"

Loss = Callable[[Tensor, Tensor], Tensor]


def run(settings: Settings) -> Report:
    """MB that a process sends in a step of a Mamba language model with AdamW, float32 but where it says otherwise.

    CPU processes (gloo). Counted: a gathering or scattering sends its parts once around a ring, a sum twice. A note has
    what that is a parameter, and the bytes of parameters, gradients and moments that a process holds after the step.

    Raises:
        ArgumentError: another device, or an odd number of processes.
    """
    if settings.device != "cpu":
        raise ArgumentError(f"device: got {settings.device!r}; bytes are counted between processes on CPUs (cpu)")
    shapes = settings.shapes_of(AXES, (4, 4, 256, 256, 4, 256), (4, 4, 256, 256, 4, 512))
    rows = [row for shape in shapes for row in measure(shape, settings)]
    about = {"device": "cpu", "axes": AXES, "shapes": shapes}
    return Report("layouts", "MB", higher_is_better=False, rows=rows, settings=about)


def measure(shape: tuple[int, ...], settings: Settings) -> list[Row]:
    """The rows of one shape; ``batch`` is of all processes."""
    processes, layers, d_model, _, batch, length = shape
    if processes % 2 or batch % processes:
        raise ArgumentError(f"shape: processes must be even and divide the batch, got {processes} and {batch}")
    settings.progress(describe(shape, "float32"))
    found = spawned(_worker, processes, shape, settings.seed)
    rows = []
    for name in _LAYOUTS:
        most = max((each[name] for each in found), key=lambda own: own["sent"])
        count, sent = most["parameters"], most["sent"]
        note = f"{sent / count:.2f} bytes a parameter; holds {most['held'] / count:.2f} bytes a parameter"
        series = f"{processes} processes, {layers} layers of {d_model}"
        group = describe(shape, "float32")
        rows.append(Row(group, name, "peer", None, sent / 1e6, note=note, series=series, place=batch * length))
    return rows


def _laid_out(**options: Any) -> Callable[[LanguageModel, Ranks], Loss]:
    config, cpu = TrainConfig(**options), torch.device("cpu")

    def make(model: LanguageModel, ranks: Ranks) -> Loss:
        net = lay_out(model, config, ranks, cpu)
        sharers, place = ranks.size // config.tensor_parallel, ranks.rank // config.tensor_parallel

        def loss(tokens: Tensor, targets: Tensor) -> Tensor:
            rows = tokens.shape[0] // sharers
            own = slice(place * rows, (place + 1) * rows)
            with autocast(cpu, config.precision):
                value: Tensor = net(tokens[own], targets[own], None)[0]
            return value

        return loss

    return make


def _by_channel(model: LanguageModel, ranks: Ranks) -> Loss:
    return _laid_out(tensor_parallel=ranks.size)(model, ranks)


def _by_length(model: LanguageModel, ranks: Ranks) -> Loss:
    net = lay_out(model, TrainConfig(), ranks, torch.device("cpu"))

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        part = current_part()
        assert part is not None
        value: Tensor = net(part.take(tokens), part.take(targets), None)[0]
        return value

    return loss


_LAYOUTS: dict[str, Callable[[LanguageModel, Ranks], Loss]] = {
    "ddp": _laid_out(),
    "fsdp": _laid_out(parallel="fsdp"),
    "fsdp, gathered in bfloat16": _laid_out(parallel="fsdp", precision="bfloat16", gather_precision="bfloat16"),
    "fsdp, 2 replicas": _laid_out(parallel="fsdp", replicas=2),
    "tensor parallel": _by_channel,
    "tensor parallel by 2, fsdp": _laid_out(parallel="fsdp", tensor_parallel=2),
    "sequence parallel, ddp": _by_length,
}


def _worker(shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    processes, layers, d_model, vocabulary, batch, length = shape
    ranks = Ranks(dist.get_rank(), processes)
    tokens, targets = make_batch(batch, length, vocabulary, Settings(device="cpu", seed=seed))
    found = {}
    for name, make in _LAYOUTS.items():
        model = make_model(layers, d_model, vocabulary, torch.float32, "cpu", seed).train().requires_grad_()
        count = model.num_parameters()
        loss = make(model, ranks)
        # Parameter by parameter: some are DTensors and some are not.
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        shared = sequence_parallel(length=length) if make is _by_length else contextlib.nullcontext()
        with _Sent() as sent, shared as part:
            loss(tokens, targets).backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        held = _bytes([*model.parameters(), *gradients])
        optimizer.step()
        held += _bytes([value for state in optimizer.state.values() for value in state.values() if value.ndim])
        sent.bytes += 0 if part is None else part.traffic.bytes
        found[name] = {"sent": sent.bytes, "held": held, "parameters": count}
    return found


def _bytes(tensors: list[Tensor]) -> int:
    """Of this process."""
    own = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


class _Sent(TorchDispatchMode):
    """Counts the bytes that this process sends in collectives, as a ring sends them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            # Of the whole, this process's part stays.
            small, whole = sorted(map(_size, args[:2]))
            self.bytes += whole - small
        elif name == "allreduce_":
            size = dist.ProcessGroup.unbox(args[1]).size()
            self.bytes += 2 * sum(map(_size, args[0])) * (size - 1) / size
        elif name in ("all_reduce", "all_reduce_"):
            size = dist.distributed_c10d._resolve_process_group(args[-1]).size()
            self.bytes += 2 * _size(args[0]) * (size - 1) / size
        elif name == "reduce_scatter_tensor":
            self.bytes += _size(args[0]) * (args[2] - 1) / args[2]
        elif name == "all_gather_into_tensor":
            self.bytes += _size(args[0]) * (args[1] - 1)
        elif name not in _SILENT:
            raise ArgumentError(f"what {name} sends is not known")


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()

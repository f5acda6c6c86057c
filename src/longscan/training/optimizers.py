"""Parameter groups, and several optimisers stepped as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import CheckpointError
from longscan.training.config import TrainConfig

_ENDS = ("embedding.weight", "lm_head.weight")


def parameter_groups(model: nn.Module, *, muon: bool) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by treatment: "decay", "no_decay" and, if asked for, "muon".

    Vectors (norms, biases, D) and what a module marks with ``_no_weight_decay`` (A_log) are not decayed. Muon takes the
    matrices of the layers, not the embedding or the head.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}, "muon": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False):
            kind = "no_decay"
        elif muon and parameter.ndim == 2 and not parameter.is_complex() and not name.endswith(_ENDS):
            kind = "muon"
        else:
            kind = "decay"
        groups[kind][name] = parameter
    return {kind: members for kind, members in groups.items() if members}


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters by the processes that their shards are on: one operation on many tensors takes no others together."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())


class Optimizers:
    """AdamW, and Muon beside it if the configuration says so.

    Args:
        model: the model; parameters are known by their names in it.
        config: rates, betas and decay.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, muon=config.optimizer == "muon")
        adamw = [
            {"params": parameters, "weight_decay": decay}
            for kind, decay in (("decay", config.weight_decay), ("no_decay", 0.0))
            for parameters in alike(groups.get(kind, {}).values())
        ]
        self._optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if adamw:
            fused = all(parameter.dtype != torch.complex64 for parameter in self.names)
            betas = (config.beta1, config.beta2)
            optimizer = torch.optim.AdamW(adamw, lr=config.learning_rate, betas=betas, fused=fused)
            self._optimizers["adamw"] = (optimizer, config.learning_rate)
        if "muon" in groups:
            rate = config.muon_learning_rate
            # AdamW's decay acts per step as rate * decay; the same product here, whatever Muon's own rate.
            decay = config.weight_decay * config.learning_rate / rate
            matrices = [{"params": parameters} for parameters in alike(groups["muon"].values())]
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay)
            self._optimizers["muon"] = (muon, rate)

    def step(self, factor: float) -> None:
        """One update at ``factor`` times the peak learning rates; then the gradients are gone."""
        for optimizer, peak in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        for optimizer, _ in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All state as tensors named ``optimizer/key/parameter``."""
        return {
            f"{kind}/{key}/{self.names[parameter]}": value
            for kind, (optimizer, _) in self._optimizers.items()
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor], source: object) -> None:
        """Take back what :meth:`tensors` gave, exactly.

        Raises:
            CheckpointError: the names or shapes are of other optimisers or another model.
        """
        for full_name, tensor in tensors.items():
            kind, key, parameter = self._owner(full_name, tensor.shape, source)
            self._optimizers[kind][0].state[parameter][key] = tensor.to(parameter.device)

    def empty(self, stored: dict[str, tuple[torch.Size, torch.dtype]], source: object) -> dict[str, Tensor]:
        """Tensors to read what :meth:`tensors` gave into, in shards where the parameters are.

        Raises:
            CheckpointError: as :meth:`load_tensors`.
        """
        made: dict[str, Tensor] = {}
        for full_name, (shape, dtype) in stored.items():
            _, _, parameter = self._owner(full_name, shape, source)
            made[full_name] = torch.zeros_like(parameter, dtype=dtype) if shape else torch.zeros((), dtype=dtype)
        return made

    def _owner(self, full_name: str, shape: torch.Size, source: object) -> tuple[str, str, Tensor]:
        """Optimiser, key and parameter that a tensor is of."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        kind, _, rest = full_name.partition("/")
        key, _, name = rest.partition("/")
        if kind not in self._optimizers or name not in parameters:
            raise CheckpointError(f"{source} is of another optimiser or model: {full_name!r} has no place here")
        parameter = parameters[name]
        if shape and shape != parameter.shape:
            raise CheckpointError(f"{source}: {full_name!r} is {tuple(shape)}, its parameter {tuple(parameter.shape)}")
        return kind, key, parameter


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients down to a norm of at most ``largest`` (0: leave them) and give the norm before that.

    Of gradients in shards, the norm is that of the whole.
    """
    groups = alike(parameters)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if largest > 0:
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, largest, total)
    return total

"""Intermediate results that are computed again in the backward pass instead of being kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Place = tuple[int, int, torch.dtype]


class Recompute:
    """A block in which autograd does not keep the tensors that :meth:`drop` names.

    Where the backward pass asks for one, it is computed again, once. Without effect with `enabled` false, where no
    gradients are recorded, and in traced graphs, whose compiler decides for itself.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self._enabled = enabled and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self._device = device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self._recipes: dict[_Place, Callable[[], Tensor]] = {}
        self._again: dict[_Place, Tensor] = {}
        self._hooks: Any = None

    def __enter__(self) -> Recompute:
        if self._enabled:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        # What autograd keeps holds this object by its hooks; the way back would make a cycle.
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(*exception)

    def drop(self, tensor: Tensor, recipe: Callable[[], Tensor]) -> None:
        """Do not keep `tensor`, nor views of all of it; `recipe()` gives it again.

        The caller holds on to `tensor` until the end of the block, so that nothing else comes to lie there. The recipe
        holds detached tensors only: others would hold the graph that holds the recipe.
        """
        if self._enabled:
            self._recipes[_place(tensor)] = recipe

    def _pack(self, tensor: Tensor) -> Any:
        place = _place(tensor)
        return (place, tensor.shape, tensor.stride()) if place in self._recipes else tensor

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        place, shape, strides = kept
        if place not in self._again:
            enabled, dtype = self._autocast
            with torch.no_grad(), torch.autocast(self._device, dtype=dtype, enabled=enabled):
                self._again[place] = self._recipes[place]()
        return self._again[place].as_strided(shape, strides)


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype

"""What a forward pass keeps for its backward pass, counted tensor by tensor on any device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor


class Kept:
    """Within the block, bytes of memory that autograd keeps: of each piece of memory once, weights left out.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._held: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda held: held.tensor)

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def hold(self, place: int, size: int) -> None:
        """A tensor is kept that lies in the ``size`` bytes at ``place``."""
        if place not in self._weights:
            self._held[place] += 1
            if self._held[place] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)

    def release(self, place: int, size: int) -> None:
        """It is no longer."""
        if place not in self._weights:
            self._held[place] -= 1
            if not self._held[place]:
                self.now -= size


class _Held:
    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self._kept = tensor, kept
        self._place, self._size = storage.data_ptr(), storage.nbytes()
        kept.hold(self._place, self._size)

    def __del__(self) -> None:
        self._kept.release(self._place, self._size)

"""Batches with padding: the tokens that count, side by side in one packed row, and back.

A recurrence that walks over padding is wrong: the state decays there, and the convolution's window fills with it. So
padding is left out, wherever it stands; what is left is packed sequences, which the operators know.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor

from longscan.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are.

    Attributes:
        mask: (batch, length) bool, which of them count.
        places: (tokens,) where they are in (batch * length); none, if all of the batch is padding.
        cu_seqlens: (batch + 1,) where each row begins and ends among them.
    """

    mask: Tensor
    places: Tensor
    cu_seqlens: Tensor

    @property
    def empty(self) -> bool:
        """Whether no token counts, so that there is nothing to compute: a chunk of a long prompt can be all padding."""
        return self.places.numel() == 0

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, ...) to (1, tokens, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, y: Tensor) -> Tensor:
        """(1, tokens, ...) to (batch, length, ...), zero at padding."""
        batch, length = self.mask.shape
        flat = y.new_zeros(batch * length, *y.shape[2:]).index_copy(0, self.places, y[0])
        return flat.unflatten(0, (batch, length))

    def hold(self, y: Tensor) -> Tensor:
        """(batch, length, ...) where padding repeats what the last token before it has (zero, if there is none)."""
        source = torch.arange(self.mask.shape[1], device=y.device).expand_as(self.mask)
        source = source.masked_fill(~self.mask, -1).cummax(1).values
        rows = torch.arange(self.mask.shape[0], device=y.device)[:, None]
        held = y[rows, source.clamp(min=0)]
        return held.masked_fill((source < 0).view(*source.shape, *[1] * (y.dim() - 2)), 0)

    def last(self, x: Tensor, before: Tensor | None, count: int) -> Tensor:
        """The last ``count`` inputs of each row, those before this batch included: (batch, count, channels).

        Args:
            x: (1, tokens, channels), packed.
            before: (batch, count, channels), the last ones before; None: zeros.
        """
        ends = self.cu_seqlens[1:, None].long()
        fresh = ends - self.cu_seqlens[:-1, None].long()
        behind = torch.arange(count, 0, -1, device=x.device)
        new = x[0][(ends - behind).clamp(min=0)]
        if before is None:
            before = torch.zeros_like(new)
        # An input that lies `behind` steps back of all lay `behind - fresh` steps back before.
        old = (count - (behind - fresh)).clamp(0, count - 1)
        old = before.gather(1, old[..., None].expand(-1, -1, before.shape[-1]))
        return torch.where((behind <= fresh)[..., None], new, old)


def packing_of(mask: Tensor | None, length: int) -> Packing | None:
    """The packing of a batch by its attention mask; None if nothing in it is padding.

    Args:
        mask: (batch, at least length), zero at padding; the last ``length`` columns are this batch's, those before are
            of tokens that a cache has taken in. None, or a mask of another kind (with more axes), counts every token.
        length: of the batch.

    Raises:
        ArgumentError: the mask is shorter than the batch.
    """
    if mask is None or mask.dim() != 2:
        return None
    return _look_up(mask, length)


# The layers of a model ask for the same mask one after the other; its values are looked at once, which on a GPU is a
# wait. The mask itself is not kept alive.
_latest: tuple[weakref.ref[Tensor], int, int, Packing | None] | None = None


@torch.compiler.disable
def _look_up(mask: Tensor, length: int) -> Packing | None:
    global _latest
    if mask.is_inference():
        # It does not count its changes.
        return _look_at(mask, length)
    latest = _latest
    if latest is not None and latest[0]() is mask and latest[1:3] == (mask._version, length):
        return latest[3]
    packing = _look_at(mask, length)
    _latest = (weakref.ref(mask), mask._version, length, packing)
    return packing


def _look_at(mask: Tensor, length: int) -> Packing | None:
    if mask.shape[1] < length:
        raise ArgumentError(f"attention_mask: got shape {tuple(mask.shape)}, the input has length {length}")
    counts = mask[:, mask.shape[1] - length :] != 0
    if bool(counts.all()):
        return None
    places = counts.flatten().nonzero().squeeze(1)
    ends = counts.sum(1).cumsum(0)
    return Packing(counts, places, torch.nn.functional.pad(ends, (1, 0)))

r"""Attention: every token looks at all earlier ones, with rotary positions; its memory is every key and value.

Vaswani et al. 2017, with rotary positions (Su et al. 2021) and optionally fewer heads of keys and values than of
queries (Ainslie et al. 2023):

.. math::
    q, k, v = W_{in} x, \qquad y_t = W_{out} \sum_{s \le t} \mathrm{softmax}_s
    \Big(\frac{R_t q_t \cdot R_s k_s}{\sqrt{d_{head}}}\Big) v_s

Without rotary positions, R is 1: the model adds positions to its embeddings, or does without.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.mixer import SequenceMixer, check_batch, check_sizes
from longscan.nn.positions import places
from longscan.nn.rotary import rotate
from longscan.nn.sequence_parallel import SequencePart, current_part
from longscan.nn.state import State


@dataclasses.dataclass(frozen=True)
class AttentionState(State):
    """Keys (turned) and values so far, (batch, heads, capacity, head_dim), and how many of them count, (batch,).

    Rows may differ in length. ``used`` is at least the longest: places from there on are spare.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor
    used: int = 0

    @classmethod
    def _cat(cls, states: Sequence[AttentionState]) -> AttentionState:
        used = max(state.used for state in states)
        return cls(
            keys=torch.cat([_resize(state.keys, state.used, used) for state in states]),
            values=torch.cat([_resize(state.values, state.used, used) for state in states]),
            lengths=torch.cat([state.lengths for state in states]),
            used=used,
        )


class Attention(SequenceMixer):
    """Causal multi-head attention: ``y, _ = Attention(d_model=256, n_heads=8)(x)``.

    Its state grows by two vectors per token and head of keys; :meth:`state_bytes` tells. A loop that gives its state
    away (``step(..., inplace=True)``) appends in place to memory that grows by half when it is full.

    Args:
        d_model: width of input and output.
        n_heads: heads of queries; default: d_model / 64, at least 1.
        n_kv_heads: heads of keys and values, a divisor of n_heads; default: n_heads.
        head_dim: width of a head, with rotary positions even; default: d_model / n_heads.
        rotary: whether queries and keys are turned by their positions.
        rotary_base: the longest wavelength of the positions over 2 pi.
        bias: whether the projections have biases.

    Raises:
        ArgumentError: a size is below 1, heads do not divide one another or the width, or head_dim is odd with rotary
            positions.
    """

    undivided = None

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10_000.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model)
        n_heads = max(1, d_model // 64) if n_heads is None else n_heads
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_sizes(n_heads=n_heads, n_kv_heads=n_kv_heads)
        if n_heads % n_kv_heads:
            raise ArgumentError(f"n_kv_heads must divide n_heads; got n_heads {n_heads} and n_kv_heads {n_kv_heads}")
        if head_dim is None:
            if d_model % n_heads:
                raise ArgumentError(f"n_heads must divide d_model, got d_model {d_model} and n_heads {n_heads}")
            head_dim = d_model // n_heads
        check_sizes(head_dim=head_dim)
        if rotary and head_dim % 2:
            raise ArgumentError(f"head_dim must be even, for rotary positions; got {head_dim}")
        self.d_model, self.n_heads, self.n_kv_heads, self.head_dim = d_model, n_heads, n_kv_heads, head_dim
        self.rotary, self.rotary_base = rotary, rotary_base
        heads = n_heads + 2 * n_kv_heads
        self.in_proj = nn.Linear(d_model, heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        self.check_input(x, state, cu_seqlens, AttentionState)
        before = state if isinstance(state, AttentionState) else None
        part = current_part()
        if part is not None:
            return self._divided(x, part, cu_seqlens), None
        if cu_seqlens is not None:
            return self._packed(x, before, cu_seqlens)
        queries, keys, values = self._project(x)
        steps = torch.arange(x.shape[1], device=x.device)
        if before is None:
            queries, keys = self._turned(queries, keys, steps[None])
            return self._merge(self._attend(queries, keys, values, None)), None
        positions = before.lengths[:, None] + steps
        queries, keys = self._turned(queries, keys, positions)
        after = _append(before, keys, values, before.used + x.shape[1])
        if before.used == 0:
            # Nothing came before, so the causal kernels serve, which need no mask.
            return self._merge(self._attend(queries, keys, values, None)), after
        visible = torch.arange(after.used, device=x.device) <= positions[..., None]  # (batch, length, used)
        return self._merge(self._attend(queries, after.keys, after.values, visible[:, None])), after

    def _packed(
        self, x: Tensor, before: AttentionState | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, AttentionState | None]:
        """One attention per sequence: a mask over the whole row would cost the square of its length."""
        offsets = cu_seqlens.tolist()
        _check_offsets(offsets, x.shape[1])
        outputs: list[Tensor] = []
        states: list[AttentionState] = []
        for sequence, (start, end) in enumerate(itertools.pairwise(offsets)):
            own: AttentionState | None = None
            if before is not None:
                own = before.select([sequence])
                # Rows of a ragged batch end early: what lies behind would only widen the mask.
                length = int(own.lengths[0])
                own = AttentionState(own.keys[:, :, :length], own.values[:, :, :length], own.lengths, length)
            if end > start:
                y, own = self(x[:, start:end], own)
                outputs.append(y)
            if own is not None:
                states.append(own)
        return torch.cat(outputs, dim=1), AttentionState.cat(states) if before is not None else None

    def _divided(self, x: Tensor, part: SequencePart, cu_seqlens: Tensor | None) -> Tensor:
        """This process's queries over all earlier keys and values, which go from every process to all later ones.

        As in Llama 3's training (arXiv 2407.21783, section 3.3.2): of the length, keys and values alone are whole.
        """
        from torch.nn.attention.bias import causal_lower_right  # brings the compiler with it

        segments = part.segments(x, cu_seqlens)
        queries, keys, values = self._project(x)
        offsets = [0, x.shape[1]] if segments.cu_seqlens is None else segments.cu_seqlens.tolist()
        # Where the sequence began in which each of this part's lies: the first may have begun in an earlier part.
        begins = [segments.begin(part.start + offset) for offset in offsets[:-1]]
        queries, keys = self._turned(queries, keys, places(x.shape[1], x.device, None, cu_seqlens))
        keys, values = part.all_before(keys, 2), part.all_before(values, 2)
        outputs = []
        for begin, (start, end) in zip(begins, itertools.pairwise(offsets), strict=True):
            own, seen = queries[:, :, start:end], slice(begin, part.start + end)
            # Queries are the last of what they see.
            mask = None if begin == part.start + start else causal_lower_right(end - start, part.start + end - begin)
            outputs.append(self._attend(own, keys[:, :, seen], values[:, :, seen], mask))
        return self._merge(torch.cat(outputs, dim=2))

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, AttentionState]:
        if not inplace or torch.is_grad_enabled():
            y, after = self(x.unsqueeze(1), state)
            return y.squeeze(1), after
        x = x.unsqueeze(1)
        self.check_input(x, state, None, AttentionState)
        assert isinstance(state, AttentionState)
        queries, keys, values = self._project(x)
        positions = state.lengths[:, None]
        queries, keys = self._turned(queries, keys, positions)
        capacity = state.keys.shape[2]
        if state.used == capacity:
            capacity += max(64, capacity // 2)
            state = dataclasses.replace(
                state,
                keys=_resize(state.keys, state.used, capacity),
                values=_resize(state.values, state.used, capacity),
            )
        index = positions[:, None, :, None].expand_as(keys)
        state.keys.scatter_(2, index, keys.to(state.keys.dtype))
        state.values.scatter_(2, index, values.to(state.values.dtype))
        used = state.used + 1
        visible = torch.arange(used, device=x.device) <= positions[..., None]
        y = self._attend(queries, state.keys[:, :, :used], state.values[:, :, :used], visible[:, None])
        state.lengths.add_(1)
        return self._merge(y).squeeze(1), dataclasses.replace(state, used=used)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, length, d_model) to queries, keys and values, each (batch, heads, length, head_dim)."""
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        queries, keys, values = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        return queries, keys, values

    def _turned(self, queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not self.rotary:
            return queries, keys
        return rotate(queries, positions, self.rotary_base), rotate(keys, positions, self.rotary_base)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            queries,
            keys.to(queries.dtype),
            values.to(queries.dtype),
            attn_mask=visible,
            is_causal=visible is None,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )

    def _merge(self, y: Tensor) -> Tensor:
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        check_batch(batch)
        weight = self.in_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(batch, self.n_kv_heads, 0, self.head_dim, device=device, dtype=dtype or weight.dtype)
        lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        return AttentionState(keys=empty, values=empty.clone(), lengths=lengths)

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Two vectors per token and head of keys, and a length per sequence."""
        per_token = 2 * self.n_kv_heads * self.head_dim * self.in_proj.weight.element_size()
        return batch * (length * per_token + 8)

    def extra_repr(self) -> str:
        sizes = f"{self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}"
        return sizes if self.rotary else f"{sizes}, rotary=False"


def _append(state: AttentionState, keys: Tensor, values: Tensor, capacity: int) -> AttentionState:
    """A new state with keys and values (batch, heads, length, head_dim) after each row's own."""
    length = keys.shape[2]
    places = state.lengths[:, None] + torch.arange(length, device=keys.device)
    index = places[:, None, :, None].expand_as(keys)
    return AttentionState(
        keys=_resize(state.keys, state.used, capacity).scatter(2, index, keys.to(state.keys.dtype)),
        values=_resize(state.values, state.used, capacity).scatter(2, index, values.to(state.values.dtype)),
        lengths=state.lengths + length,
        used=capacity,
    )


def _resize(cache: Tensor, used: int, capacity: int) -> Tensor:
    """A copy of the used places, with room for ``capacity``."""
    return F.pad(cache[:, :, :used], (0, 0, 0, capacity - used))


def _check_offsets(offsets: list[int], length: int) -> None:
    falls = any(end < start for start, end in itertools.pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != length or falls:
        raise ArgumentError(
            f"cu_seqlens must start at 0, never fall and end at the length {length}; got {offsets[:8]}"
            + (" ..." if len(offsets) > 8 else "")
        )

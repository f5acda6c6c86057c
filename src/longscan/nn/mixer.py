"""The protocol of every system: a sequence in, one of the same shape out, through a memory of the past."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.sequence_parallel import current_part, whole_sequences_only
from longscan.nn.state import State

T = TypeVar("T", bound=Tensor)

# What parameters are marked with.
_MARKS = ("_keep_float32", "_no_weight_decay", "_no_reinit")


class SequenceMixer(nn.Module, abc.ABC):
    """Maps (batch, length, d_model) to the same shape, causally.

    ``y, state = mixer(x, state)`` takes any length from 1, any number of times; ``mixer(x)`` starts afresh and carries
    nothing (the state that comes back is None). Cutting a sequence anywhere and handing the state over changes nothing,
    neither outputs nor gradients. Nothing is changed in place.
    """

    d_model: int

    #: Whether the mixer is one fixed convolution, so that :meth:`convolution_kernel` exists.
    time_invariant: ClassVar[bool] = False

    #: Whether CUDA graphs can capture it: no call waits for the GPU.
    capturable: bool = True

    #: Why it cannot share sequences with other processes (:mod:`longscan.nn.sequence_parallel`); None: it can.
    undivided: str | None = "nothing says how its state goes from one process to the next"

    if TYPE_CHECKING:
        # A call is `forward`, which PyTorch's own types leave open.
        def __call__(
            self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, Any]: ...

    @abc.abstractmethod
    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Mix along the sequence.

        Args:
            x: (batch, length, d_model), length at least 1.
            state: what earlier calls left; None starts afresh and carries nothing.
            cu_seqlens: (sequences + 1,) int32 or int64 offsets of several sequences packed in one row (batch 1).
                Nothing leaks across their borders; the state's batch is then the number of sequences.

        Returns:
            y, of the shape and dtype of x, and the state after it (None if none was given).

        Raises:
            ArgumentError: a shape, dtype or device does not fit, or the state is of another mixer or batch size.
        """

    @abc.abstractmethod
    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The memory of an empty past, for ``batch`` sequences.

        Args:
            batch: number of sequences, at least 1.
            device: default: where the parameters are.
            dtype: of what is kept of activations (default: the parameters'). Recurrent states are float32 or complex64
                whatever the activations (float64 and complex128 for a float64 mixer).
        """

    def step(self, x: Tensor, state: State, *, inplace: bool = False) -> tuple[Tensor, State]:
        """One token per sequence: x (batch, d_model) to y (batch, d_model) and the next state.

        With ``inplace`` the caller gives its state away: its memory may be reused for the next one. No gradients then.
        """
        y, after = self(x.unsqueeze(1), state)
        return y.squeeze(1), after

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of ``batch`` sequences after ``length`` tokens each; the same at any length by default."""
        return self.initial_state(batch, device="meta").nbytes

    def convolution_kernel(self, length: int) -> Tensor:
        """The mixer's linear part as a convolution kernel, (channels, length).

        Raises:
            ArgumentError: the mixer depends on its input, so there is no kernel.
        """
        raise ArgumentError(f"{type(self).__name__} depends on its input over time, it has no convolution kernel")

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceMixer:
        # PyTorch's copies of parameters lose what is marked on them.
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        for old, new in zip(self.parameters(), clone.parameters(), strict=True):
            for mark in _MARKS:
                if hasattr(old, mark):
                    setattr(new, mark, getattr(old, mark))
        return clone

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequenceMixer:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if getattr(tensor, "_keep_float32", False):
                if moved.dtype in (torch.bfloat16, torch.float16):
                    moved = tensor.to(device=moved.device, dtype=torch.float32)
                # A buffer is replaced by what is returned here, where a parameter stays the same object.
                moved._keep_float32 = True  # type: ignore[attr-defined]
            return moved

        return super()._apply(apply, recurse)

    def check_input(self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, kind: type[State]) -> None:
        """Raise ArgumentError unless the arguments of ``forward`` fit this mixer; ``kind`` is its type of state."""
        name = type(self).__name__
        whole_sequences_only(name, self.undivided)
        if state is not None and current_part() is not None:
            raise ArgumentError("state: within sequence_parallel it comes from the process before; pass None")
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ArgumentError(
                f"x must be (batch, length, {self.d_model}) for this {name}, got shape {tuple(x.shape)}"
            )
        if x.shape[0] < 1 or x.shape[1] < 1:
            raise ArgumentError(f"x is empty: got shape {tuple(x.shape)}, batch and length must be at least 1")
        weight = next(self.parameters())
        if x.device.type == "meta":
            raise ArgumentError("x is on meta, where nothing is computed; shapes alone: FakeTensorMode of PyTorch")
        if x.device != weight.device:
            raise ArgumentError(f"x is on {x.device} and the {name} on {weight.device}; move one with .to(device)")
        # While torch.export traces, stand-ins of the parameters carry no marks, and so do not say their dtype's role.
        checked = not torch.compiler.is_exporting() and not torch.is_autocast_enabled(x.device.type)
        expected = self.activation_dtype()
        if checked and expected is not None and x.dtype != expected:
            raise ArgumentError(
                f"x is {x.dtype} and the weights of this {name} are {expected}; convert x, or the mixer "
                "with .to(dtype), or run under torch.autocast"
            )
        sequences = x.shape[0]
        if cu_seqlens is not None:
            if not isinstance(cu_seqlens, Tensor):
                raise ArgumentError(f"cu_seqlens must be a tensor of offsets, got a {type(cu_seqlens).__name__}")
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
                raise ArgumentError(
                    "cu_seqlens must be (sequences + 1,) offsets, int32 or int64, of at least one sequence; got "
                    f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
                )
            if x.shape[0] != 1:
                raise ArgumentError(
                    f"packed sequences share one row: with cu_seqlens batch must be 1, got {x.shape[0]}"
                )
            sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            check_state(name, state, kind, sequences)

    def activation_dtype(self) -> torch.dtype | None:
        """The dtype of the weights, and so of the activations outside autocast; None if all are kept float32, and
        activations of any dtype do."""
        for parameter in self.parameters():
            if parameter.is_floating_point() and not getattr(parameter, "_keep_float32", False):
                return parameter.dtype
        return None


def check_state(name: str, state: Any, kind: type[State], sequences: int) -> None:
    """Raise ArgumentError unless ``state`` is a ``kind`` for this many sequences."""
    if not isinstance(state, kind):
        raise ArgumentError(
            f"state must be a {kind.__name__} (of {name}.initial_state or an earlier call), got {type(state).__name__}"
        )
    if state.batch != sequences:
        raise ArgumentError(f"state is for {state.batch} sequences, the input has {sequences}")


def check_batch(batch: int) -> None:
    """Raise ArgumentError unless ``batch`` is a positive integer."""
    if not isinstance(batch, (int, torch.SymInt)) or batch < 1:
        raise ArgumentError(f"batch must be an integer of at least 1, got {batch!r}")


def check_sizes(**sizes: int) -> None:
    """Raise ArgumentError, naming it, unless each is a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ArgumentError(f"{name} must be an integer of at least 1, got {size!r}")


def keep_float32(tensor: T) -> T:
    """Mark a parameter or buffer that stays float32 when its module is converted to bfloat16 or float16."""
    tensor._keep_float32 = True  # type: ignore[attr-defined]
    return tensor


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that an optimiser must not decay."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter

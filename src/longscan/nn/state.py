"""What a mixer remembers of the past: small frozen dataclasses of tensors with the sequences along the first axis."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from longscan.errors import ArgumentError, CheckpointError
from longscan.nn.storage import load_tensors, save_tensors

S = TypeVar("S", bound="State")

_FORMAT = "longscan.state"


@dataclasses.dataclass(frozen=True)
class State:
    """Base of every state.

    A subclass is a frozen dataclass whose fields are tensors with the sequences of the batch along axis 0, plain
    integers, other states, tuples of states, or None. It becomes a pytree and can be moved, copied, selected along the
    batch, saved and loaded without further code.
    """

    _types: ClassVar[dict[str, type[State]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        State._types[cls.__name__] = cls
        # A dataclass keeps what stands in its class, and would otherwise print every number of its tensors.
        cls.__repr__ = State.__repr__  # type: ignore[method-assign]
        # Tensors and plain values only: exported programs and checkpoints with states load without unpickling code.
        torch.serialization.add_safe_globals([cls])
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, context: _unflatten(cls, values, context),
            serialized_type_name=f"longscan.{cls.__name__}",
            flatten_with_keys_fn=_flatten_with_keys,
            to_dumpable_context=lambda context: json.dumps(context),
            from_dumpable_context=lambda text: json.loads(text),
        )

    def __repr__(self) -> str:
        fields = ", ".join(f"{field.name}={_brief(getattr(self, field.name))}" for field in _fields(self))
        return f"{type(self).__name__}({fields})"

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The state with ``function`` applied to every tensor."""
        return dataclasses.replace(self, **{f.name: _map(getattr(self, f.name), function) for f in _fields(self)})

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of the fields."""
        found: list[Tensor] = []

        def visit(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(visit)
        return found

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return _first_tensor(self).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def to(self: S, device: torch.device | str | None = None) -> S:
        """The state on another device. Dtypes stay: they are part of what a state is."""
        return self.map(lambda tensor: tensor.to(device))

    def detach(self: S) -> S:
        """The state without its history of gradients (truncated back-propagation through time)."""
        return self.map(Tensor.detach)

    def clone(self: S) -> S:
        """A copy with its own memory."""
        return self.map(Tensor.clone)

    def select(self: S, indices: Tensor | Sequence[int]) -> S:
        """The sequences ``indices`` in that order, copied. An index may come several times: that forks a sequence.

        Raises:
            ArgumentError: an index outside the batch.
        """
        batch = self.batch
        if not isinstance(indices, Tensor):
            out = [index for index in indices if not 0 <= index < batch]
            if out:
                raise ArgumentError(f"indices must lie in 0 .. {batch - 1}, the batch of this state; got {out}")
            indices = torch.tensor(indices, dtype=torch.int64)
        chosen = indices
        return self.map(lambda tensor: tensor.index_select(0, chosen.to(tensor.device)))

    def repeat(self: S, times: int) -> S:
        """Each sequence ``times`` times, side by side: the fork of a whole batch."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))

    @classmethod
    def cat(cls: type[S], states: Sequence[S]) -> S:
        """One state of all sequences of several, in order."""
        if not states:
            raise ArgumentError("states: at least one state is needed to concatenate")
        for state in states:
            if type(state) is not type(states[0]):
                raise ArgumentError(
                    f"states must be of one kind, got {type(states[0]).__name__} and {type(state).__name__}"
                )
        return type(states[0])._cat(states)

    @classmethod
    def _cat(cls: type[S], states: Sequence[S]) -> S:
        columns = {field.name: [getattr(state, field.name) for state in states] for field in _fields(states[0])}
        return dataclasses.replace(states[0], **{name: _cat(values) for name, values in columns.items()})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state as one safetensors file; a write that fails leaves an old file untouched.

        Raises:
            StorageError: the file could not be written.
        """
        tensors: dict[str, Tensor] = {}
        description = _describe(self, "", tensors)
        return save_tensors(path, tensors, {_FORMAT: json.dumps(description)})

    @classmethod
    def load(cls: type[S], path: str | os.PathLike[str], device: torch.device | str | None = None) -> S:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged or truncated, or holds something else.
        """
        tensors, metadata = load_tensors(path, device)
        if _FORMAT not in metadata:
            raise CheckpointError(f"{path} holds tensors but no state; it was not written by State.save")
        try:
            state = _rebuild(json.loads(metadata[_FORMAT]), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not describe a state this version knows: {error!r}") from error
        if not isinstance(state, cls):
            raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a {cls.__name__}")
        return state


def _fields(state: State) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(state) if field.init]


def _brief(value: Any) -> str:
    """A tensor as its dtype, shape and, off the CPU, device: printing a state looks at no number of it."""
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f", {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{place}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_brief, value))}{',' * (len(value) == 1)})"
    return repr(value)


def _first_tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, State):
        value = tuple(getattr(value, field.name) for field in _fields(value))
    if isinstance(value, tuple):
        for item in value:
            found = _first_tensor(item)
            if found is not None:
                return found
    return None


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, State):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    return value


def _cat(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, State):
        return State.cat(values)
    if isinstance(first, tuple):
        return tuple(_cat(list(items)) for items in zip(*values, strict=True))
    return first


# A state as a pytree: integers and None are part of the tree's shape, everything else is a child.
def _flatten(state: State) -> tuple[list[Any], list[list[Any]]]:
    values = {field.name: getattr(state, field.name) for field in _fields(state)}
    children = [name for name, value in values.items() if not (value is None or isinstance(value, int))]
    constants = [[name, value] for name, value in values.items() if value is None or isinstance(value, int)]
    return [values[name] for name in children], [children, constants]


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], list[list[Any]]]:
    values, context = _flatten(state)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(context[0], values, strict=True)], context


def _unflatten(cls: type[S], values: Any, context: list[list[Any]]) -> S:
    return cls(**dict(zip(context[0], values, strict=True)), **dict(context[1]))


# A state as JSON: tensors are named by their place, complex ones kept as pairs of real numbers.
def _describe(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()
        return {"tensor": place, "complex": value.is_complex()}
    if isinstance(value, State):
        children = {f.name: _describe(getattr(value, f.name), f"{place}{f.name}.", tensors) for f in _fields(value)}
        return {"state": type(value).__name__, "fields": children}
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, f"{place}{index}.", tensors) for index, item in enumerate(value)]}
    return {"value": value}


def _rebuild(description: Any, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in description:
        tensor = tensors[description["tensor"]]
        return torch.view_as_complex(tensor) if description["complex"] else tensor
    if "state" in description:
        name = description["state"]
        if name not in State._types:
            raise KeyError(f"state {name!r} is unknown; import the module that defines it first")
        fields = {key: _rebuild(value, tensors) for key, value in description["fields"].items()}
        return State._types[name](**fields)
    if "tuple" in description:
        return tuple(_rebuild(item, tensors) for item in description["tuple"])
    return description["value"]


@dataclasses.dataclass(frozen=True)
class ModelState(State):
    """The states of a model's layers, with the same methods; ``positions`` (batch,) int64 are the tokens so far, of a
    model with absolute positions."""

    layers: tuple[State | None, ...]
    positions: Tensor | None = None

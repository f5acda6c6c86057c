"""States: a pytree that can be moved, selected, joined, saved and read back, and refuses damaged files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from longscan.errors import ArgumentError, CheckpointError
from longscan.nn import ModelState, State


@dataclasses.dataclass(frozen=True)
class Example(State):
    real: Tensor
    unreal: Tensor
    count: int = 0
    absent: Tensor | None = None


def example(batch: int = 3) -> ModelState:
    layers = [Example(torch.randn(batch, 2), torch.randn(batch, 4, dtype=torch.complex64), count) for count in (5, 7)]
    return ModelState((layers[0], layers[1].map(lambda tensor: tensor * 2)))


def equal(one: State, other: State) -> bool:
    leaves, tree = pytree.tree_flatten(one)
    others, other_tree = pytree.tree_flatten(other)
    return tree == other_tree and all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


def test_it_is_a_pytree() -> None:
    state = example()
    doubled = pytree.tree_map(lambda tensor: tensor * 2, state)
    assert equal(doubled, state.map(lambda tensor: tensor * 2))
    assert doubled.layers[1].count == 7
    paths = [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(state)]
    assert ".layers[0].real" in paths


def test_it_says_what_it_holds_and_no_numbers() -> None:
    state = ModelState((example(2).layers[1], None))
    layer = "Example(real=float32[2, 2], unreal=complex64[2, 4], count=7, absent=None)"
    assert repr(state.layers[0]) == layer
    assert repr(state).startswith(f"ModelState(layers=({layer}, None)")
    assert "float32[2, 2], meta" in repr(state.to("meta"))


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().layers = ()  # type: ignore[misc]


def test_select_reorders_forks_and_copies() -> None:
    state = example()
    chosen = state.select([2, 0, 0])
    layer, source = chosen.layers[1], state.layers[1]
    assert isinstance(layer, Example)
    assert isinstance(source, Example)
    assert torch.equal(layer.unreal, source.unreal[[2, 0, 0]])
    layer.unreal.zero_()
    assert source.unreal.abs().min() > 0
    assert equal(state.select(torch.tensor([1])), state.select([1]))
    assert state.repeat(2).batch == 6
    assert equal(state.repeat(2).select([0, 2, 4]), state)
    with pytest.raises(ArgumentError, match=r"0 \.\. 2.*\[3, -1\]"):
        state.select([0, 3, -1])


def test_cat_is_the_inverse_of_select() -> None:
    state = example()
    assert equal(ModelState.cat([state.select([0]), state.select([1, 2])]), state)
    with pytest.raises(ArgumentError, match="at least one"):
        ModelState.cat([])
    with pytest.raises(ArgumentError, match="ModelState and Example"):
        State.cat([state, state.layers[0]])  # type: ignore[list-item]


def test_detach_clone_to_and_size() -> None:
    state = example().map(lambda tensor: tensor.requires_grad_())
    assert not any(tensor.requires_grad for tensor in state.detach().tensors())
    assert equal(state.clone(), state)
    assert state.clone().tensors()[0].data_ptr() != state.tensors()[0].data_ptr()
    assert all(tensor.device.type == "meta" for tensor in state.to("meta").tensors())
    assert state.nbytes == 2 * (3 * 2 * 4 + 3 * 4 * 8)
    assert state.batch == 3


def test_saved_and_loaded(tmp_path: Path) -> None:
    state = example()
    path = state.save(tmp_path / "deep" / "state.safetensors")
    assert equal(ModelState.load(path), state)
    assert equal(State.load(path), state)
    with pytest.raises(CheckpointError, match="ModelState, expected a Example"):
        Example.load(path)


def test_non_contiguous_and_conjugated_tensors_are_saved(tmp_path: Path) -> None:
    state = Example(torch.randn(4, 3).T, torch.randn(4, 3, dtype=torch.complex64).T.conj())
    assert equal(Example.load(state.save(tmp_path / "s")), state)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "garbage", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = example().save(tmp_path / "state.safetensors")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes({"truncated": content[:-9], "flipped": flipped, "empty": b"", "garbage": b"x" * 99}[damage])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        ModelState.load(path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    from longscan.nn.storage import save_tensors

    save_tensors(tmp_path / "other", {"x": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="no state"):
        State.load(tmp_path / "other")
    save_tensors(tmp_path / "other", {}, {"longscan.state": '{"state": "Unheard", "fields": {}}'})
    with pytest.raises(CheckpointError, match=r"Unheard.*import"):
        State.load(tmp_path / "other")
    save_tensors(tmp_path / "other", {}, {"longscan.state": '{"tensor": "x", "complex": false}'})
    with pytest.raises(CheckpointError, match="does not describe"):
        State.load(tmp_path / "other")

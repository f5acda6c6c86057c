"""selective_state_update against its definition in float64: heads, groups, absent arguments, padding, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.step import selective_state_update, selective_state_update_ref
from tests.integrations.mamba_ssm import formulas

BATCH, HEADS, CHANNELS, STATE = 3, 4, 5, 6


def stepped(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and new state."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt

    def spread(tensor: Tensor) -> Tensor:
        """(batch, state) or (batch, groups, state), beside the state."""
        if state.dim() == 3:
            return tensor.reshape(-1, 1, state.shape[2])
        tensor = tensor[:, None] if tensor.dim() == 2 else tensor
        return tensor.repeat_interleave(state.shape[1] // tensor.shape[1], dim=1)[:, :, None]

    new = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * spread(B)
    y = (new * spread(C)).sum(-1)
    y = y if D is None else y + D * x
    return y if z is None else y * F.silu(z), new


def arguments(heads: bool, groups: int | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    own = (HEADS, CHANNELS) if heads else (CHANNELS,)
    axis = () if groups is None else (groups,)
    return {
        "state": torch.randn(BATCH, *own, STATE),
        "x": torch.randn(BATCH, *own),
        "dt": torch.rand(BATCH, *own),
        "A": -torch.rand(*own, STATE),
        "B": torch.randn(BATCH, *axis, STATE),
        "C": torch.randn(BATCH, *axis, STATE),
        "D": torch.randn(own),
        "z": torch.randn(BATCH, *own),
        "dt_bias": torch.rand(own),
    }


@pytest.mark.parametrize("function", [selective_state_update, selective_state_update_ref])
@pytest.mark.parametrize(("heads", "groups"), [(False, None), (False, 1), (True, None), (True, 1), (True, 2)])
@pytest.mark.parametrize("absent", [(), ("D",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_a_step_is_its_definition(
    function: Any, heads: bool, groups: int | None, absent: tuple[str, ...], softplus: bool
) -> None:
    """Without D and without dt_bias too, which the original cannot take."""
    given = {name: None if name in absent else tensor for name, tensor in arguments(heads, groups).items()}
    expected, after = stepped(**{k: None if t is None else t.double() for k, t in given.items()}, dt_softplus=softplus)
    got = function(**given, dt_softplus=softplus)
    formulas.close(got, expected)
    formulas.close(given["state"], after)


@pytest.mark.parametrize("heads", [False, True])
def test_gradients_flow_through_the_state(heads: bool) -> None:
    given = arguments(heads)
    names = list(given)

    def ours(*values: Tensor) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(names, values, strict=True))
        tensors["state"] = tensors["state"].clone()
        first = selective_state_update(**tensors, dt_softplus=True)
        return first + selective_state_update(**tensors, dt_softplus=True), tensors["state"]

    def exact(*values: Tensor) -> tuple[Tensor, Tensor]:
        tensors = dict(zip(names, values, strict=True))
        first, tensors["state"] = stepped(**tensors, dt_softplus=True)
        second, after = stepped(**tensors, dt_softplus=True)
        return first + second, after

    formulas.agree(ours, exact, list(given.values()))


@pytest.mark.parametrize("heads", [False, True])
def test_indices_choose_states_and_negative_ones_are_padding(heads: bool) -> None:
    given = arguments(heads)
    states = torch.randn(8, *given["state"].shape[1:])
    expected, after = stepped(**{**given, "state": states[[5, 0, 2]]})
    kept = states.clone()
    got = selective_state_update(**{**given, "state": states}, state_batch_indices=torch.tensor([5, -1, 2]))
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
    assert not got[1].any()
    torch.testing.assert_close(states[[5, 2]], after[[0, 2]], rtol=1e-4, atol=1e-5)
    untouched = [0, 1, 3, 4, 6, 7]
    assert torch.equal(states[untouched], kept[untouched])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_state_of_half_precision_is_rounded_once(kind: torch.dtype) -> None:
    """The sums are float32: the state that is stored is the exact one, rounded."""
    given = arguments(False)
    state = given["state"].to(kind)
    _, after = stepped(**{**given, "state": state.float()})
    got = selective_state_update(**{**given, "state": state})
    assert got.dtype == torch.float32
    torch.testing.assert_close(state, after.to(kind), rtol=1e-2, atol=1e-2)
    assert (state != after.to(kind)).float().mean() < 0.02


def test_views_of_states_and_expanded_parameters() -> None:
    """States that lie apart, and parameters that all channels of a head share, as in Mamba-2."""
    given = arguments(True)
    wide = torch.randn(BATCH, HEADS, CHANNELS + 2, STATE)
    given["state"] = wide[:, :, 1:-1]
    given["A"] = -torch.rand(HEADS)[:, None, None].expand(HEADS, CHANNELS, STATE)
    given["dt"] = torch.rand(BATCH, HEADS)[..., None].expand(BATCH, HEADS, CHANNELS)
    given["D"], given["dt_bias"] = (torch.rand(HEADS)[:, None].expand(HEADS, CHANNELS) for _ in range(2))
    outside = wide[:, :, 0].clone()
    expected, after = stepped(**given)
    torch.testing.assert_close(selective_state_update(**given), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide[:, :, 1:-1], after, rtol=1e-4, atol=1e-5)
    assert torch.equal(wide[:, :, 0], outside)


def test_a_state_is_updated_where_it_lies() -> None:
    given = arguments(False)
    address = given["state"].data_ptr()
    selective_state_update(**given)
    assert given["state"].data_ptr() == address


def test_shapes_are_checked() -> None:
    given = arguments(True, 2)
    with pytest.raises(ArgumentError, match="must divide the 4 heads"):
        selective_state_update(**{**given, "B": torch.randn(BATCH, 3, STATE)})
    with pytest.raises(ArgumentError, match="state, x: got shapes"):
        selective_state_update(**{**given, "x": given["x"][:, 0]})
    with pytest.raises(ArgumentError, match="state_batch_indices: got shape"):
        selective_state_update(**given, state_batch_indices=torch.tensor([0]))

"""selective_scan_fn and mamba_inner_fn against their definitions in float64, and what reaches the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.scan import (
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)
from longscan.ops.causal_conv1d import cpu as conv_cpu
from longscan.ops.selective_scan import cpu as scan_cpu
from tests.integrations.mamba_ssm import formulas

BATCH, CHANNELS, STATE, LENGTH = 2, 6, 3, 11


def varying(groups: int | None, is_complex: bool) -> Tensor:
    """B or C: constant (None), without a group axis (0), or with one."""
    if groups is None:
        return torch.randn(CHANNELS, STATE, dtype=torch.complex64 if is_complex else torch.float32)
    axis = () if groups == 0 else (groups,)
    return torch.randn(BATCH, *axis, STATE, LENGTH * (2 if is_complex else 1))


def arguments(B: int | None = 0, C: int | None = 0, is_complex: bool = False, optional: bool = True) -> list[Any]:
    torch.manual_seed(0)
    A = -torch.rand(CHANNELS, STATE)
    return [
        torch.randn(BATCH, CHANNELS, LENGTH),
        torch.rand(BATCH, CHANNELS, LENGTH),
        torch.complex(A, torch.randn(CHANNELS, STATE)) if is_complex else A,
        varying(B, is_complex),
        varying(C, is_complex),
        *([torch.randn(CHANNELS), torch.randn(BATCH, CHANNELS, LENGTH), torch.rand(CHANNELS)] if optional else []),
    ]


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(("B", "C"), [(0, 0), (2, 2), (3, 0), (None, 0), (0, None), (None, None)])
def test_the_scan_is_its_definition(function: Any, B: int | None, C: int | None, is_complex: bool) -> None:
    """With the last state, whose gradient counts here, and in which a constant B must be."""
    formulas.agree(
        lambda *tensors: function(*tensors, delta_softplus=True, return_last_state=True),
        lambda *tensors: formulas.scan(*tensors, delta_softplus=True),
        arguments(B, C, is_complex),
    )


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("given", [(), ("D",), ("z",), ("delta_bias",)])
def test_optional_arguments(given: tuple[str, ...], softplus: bool) -> None:
    options = dict(zip(("D", "z", "delta_bias"), arguments()[5:], strict=True))
    chosen = {name: options[name] for name in given}
    out = selective_scan_fn(*arguments(optional=False), **chosen, delta_softplus=softplus)
    assert isinstance(out, Tensor)
    exact = formulas.leaves([*arguments(optional=False), *chosen.values()], double=True)
    expected, _ = formulas.scan(*exact[:5], **dict(zip(given, exact[5:], strict=True)), delta_softplus=softplus)
    formulas.close(out, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_outputs(dtype: torch.dtype) -> None:
    u, delta, A, B, C, D, z, bias = arguments()
    half = [tensor.to(dtype) for tensor in (u, delta)]
    out, state = selective_scan_fn(*half, A, B.to(dtype), C.to(dtype), D, z.to(dtype), bias, True, True)
    assert out.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, _ = formulas.scan(*(t.double() for t in (u, delta, A, B, C, D, z, bias)), delta_softplus=True)
    formulas.close(out.double(), expected, {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-6}[dtype])


def test_autocast_changes_nothing() -> None:
    """As in the original, which does not know of it."""
    plain = selective_scan_fn(*arguments())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan_fn(*arguments()), plain)


@pytest.mark.parametrize(
    ("index", "shape", "words"),
    [
        (0, (2, 6), "u: got shape"),
        (3, (2, 3, 12), "B: got a last axis of 12, expected 11"),
        (4, (2, 2, 2, 2, 2), "C: got shape"),
    ],
)
def test_shapes_are_checked(index: int, shape: tuple[int, ...], words: str) -> None:
    given = arguments(optional=False)
    given[index] = torch.randn(shape)
    with pytest.raises(ArgumentError, match=words):
        selective_scan_fn(*given)


def test_callers_of_the_autograd_functions() -> None:
    given = [*arguments(), True, True]
    for found, expected in zip(SelectiveScanFn.apply(*given), selective_scan_fn(*given), strict=True):
        assert torch.equal(found, expected)
    block = inner_arguments()
    assert torch.equal(MambaInnerFn.apply(**block), mamba_inner_fn(**block))


# mamba_inner_fn


def inner_arguments(is_complex: bool = False, width: int = 4, rank: int = 2, d_model: int = 5) -> dict[str, Any]:
    torch.manual_seed(0)
    A = -torch.rand(CHANNELS, STATE)
    numbers = STATE * (2 if is_complex else 1)
    return {
        # As a linear layer and a transposition leave it.
        "xz": torch.randn(BATCH, LENGTH, 2 * CHANNELS).transpose(1, 2),
        "conv1d_weight": torch.randn(CHANNELS, 1, width),
        "conv1d_bias": torch.randn(CHANNELS),
        "x_proj_weight": torch.randn(rank + 2 * numbers, CHANNELS) / 3,
        "delta_proj_weight": torch.randn(CHANNELS, rank) / 3,
        "out_proj_weight": torch.randn(d_model, CHANNELS) / 3,
        "out_proj_bias": torch.randn(d_model),
        "A": torch.complex(A, torch.randn(CHANNELS, STATE)) if is_complex else A,
        "D": torch.randn(CHANNELS),
        "delta_bias": torch.rand(CHANNELS),
    }


def inner(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, B: Tensor | None = None, C: Tensor | None = None,
    D: Tensor | None = None, delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None, delta_softplus: bool = True, b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None, dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The definition, in float64."""
    x, z = xz.chunk(2, dim=1)
    u, _ = formulas.conv(x, conv1d_weight[:, 0], conv1d_bias, None, True)
    selected = torch.einsum("rd,bdl->brl", x_proj_weight, u)
    rank, numbers = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)
    delta = torch.einsum("dr,brl->bdl", delta_proj_weight, selected[:, :rank])

    def pick(given: Tensor | None, rows: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        if given is None:
            given = rows if bias is None else rows + bias[:, None]
            if A.is_complex():
                # (state, part) and time to state and (time, part).
                given = given.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2)
        return given if weight is None else norm(given, weight)

    def norm(rows: Tensor, weight: Tensor) -> Tensor:
        return rows / torch.sqrt(rows.square().mean(-2, keepdim=True) + b_c_dt_rms_eps) * weight[:, None]

    B = pick(B, selected[:, rank : rank + numbers], B_proj_bias, b_rms_weight)
    C = pick(C, selected[:, rank + numbers :], C_proj_bias, c_rms_weight)
    if dt_rms_weight is not None:
        delta = norm(delta, dt_rms_weight)
    y, _ = formulas.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    out = torch.einsum("ed,bdl->ble", out_proj_weight, y)
    return out if out_proj_bias is None else out + out_proj_bias


def check_inner(given: dict[str, Any], function: Any = mamba_inner_fn) -> None:
    names = list(given)

    def named(call: Any) -> Any:
        return lambda *values: call(**dict(zip(names, values, strict=True)))

    formulas.agree(named(function), named(inner), list(given.values()), 5e-4)


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_the_block_is_its_definition(is_complex: bool) -> None:
    given = inner_arguments(is_complex)
    numbers = STATE * (2 if is_complex else 1)
    check_inner(given)
    check_inner(given, mamba_inner_ref)
    check_inner({**given, "B_proj_bias": torch.randn(numbers), "C_proj_bias": torch.randn(numbers)})
    bare = {**given, "D": None, "delta_bias": None, "conv1d_bias": None, "out_proj_bias": None}
    check_inner({**bare, "delta_softplus": False, "A": given["A"] / 4})


@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_given_B_and_C(is_complex: bool) -> None:
    given = inner_arguments(is_complex)
    check_inner({**given, "B": varying(0, is_complex), "C": varying(None, is_complex)})
    check_inner({**given, "B": varying(None, is_complex), "C": varying(2, is_complex)})


def test_inner_norms_and_their_weights() -> None:
    norms = {
        "b_rms_weight": torch.rand(STATE) + 0.5,
        "c_rms_weight": torch.rand(STATE) + 0.5,
        "dt_rms_weight": torch.rand(CHANNELS) + 0.5,
        "b_c_dt_rms_eps": 1e-3,
    }
    check_inner({**inner_arguments(), **norms})
    check_inner({**inner_arguments(), "B": varying(1, False), "b_rms_weight": norms["b_rms_weight"]})
    with pytest.raises(ArgumentError, match="for a real A"):
        mamba_inner_fn(**inner_arguments(is_complex=True), b_rms_weight=norms["b_rms_weight"])


@pytest.mark.parametrize("width", [1, 2, 7])
def test_any_width_of_the_convolution(width: int) -> None:
    check_inner(inner_arguments(width=width))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_levels_of_checkpointing(norms: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Level 1 keeps neither the convolution's output nor delta; gradients are the same to the bit."""
    kept: dict[str, list[StorageWeakRef]] = {"conv": [], "delta": []}
    convolve, scan = conv_cpu.forward, scan_cpu.forward

    def watch_conv(*tensors: Any, **options: Any) -> Any:
        out = convolve(*tensors, **options)
        kept["conv"].append(StorageWeakRef(out[0].untyped_storage()))
        return out

    def watch_scan(*tensors: Any, **options: Any) -> Any:
        kept["delta"].append(StorageWeakRef(tensors[1].untyped_storage()))
        return scan(*tensors, **options)

    monkeypatch.setattr(conv_cpu, "forward", watch_conv)
    monkeypatch.setattr(scan_cpu, "forward", watch_scan)
    given = inner_arguments()
    if norms:
        given["dt_rms_weight"] = torch.rand(CHANNELS) + 0.5
    found = []
    for level in (0, 1):
        kept["conv"].clear(), kept["delta"].clear()
        values = dict(zip(given, formulas.leaves(list(given.values())), strict=True))
        xz = values["xz"].bfloat16() if autocast else values["xz"]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = mamba_inner_fn(**{**values, "xz": xz}, checkpoint_lvl=level)
        assert [refs[0].expired() for refs in kept.values()] == [level == 1] * 2
        assert len(kept["conv"]) == 1
        out.float().square().sum().backward()
        assert len(kept["conv"]) == 1 + level
        found.append([tensor.grad for tensor in values.values()])
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ArgumentError, match="allowed are 0 and 1"):
        mamba_inner_fn(**given, checkpoint_lvl=2)


def test_half_precision_with_a_float32_bias() -> None:
    """As Transformers calls it."""
    given = inner_arguments()
    kept = ("A", "D", "delta_bias", "out_proj_bias")
    half = {name: tensor if name in kept else tensor.bfloat16() for name, tensor in given.items()}
    out = mamba_inner_fn(**half)
    assert out.dtype == torch.bfloat16
    formulas.close(out.double(), inner(**{name: tensor.double() for name, tensor in given.items()}), 5e-2)


def test_autocast_reaches_the_projections() -> None:
    linear = torch.nn.Linear(5, 2 * CHANNELS)
    given = inner_arguments()
    x = torch.randn(BATCH, LENGTH, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = mamba_inner_fn(**{**given, "xz": linear(x).transpose(1, 2)})
    assert out.dtype == torch.bfloat16
    exact = {name: tensor.double() for name, tensor in given.items()}
    expected = inner(**{**exact, "xz": F.linear(x.double(), *map(Tensor.double, linear.parameters())).transpose(1, 2)})
    formulas.close(out.double(), expected, 5e-2)


class Seen:
    """The addresses and strides of the tensors that reach a backend's function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls: list[list[tuple[int, tuple[int, ...]] | None]] = []
        original = getattr(module, name)

        def spy(*tensors: Any, **options: Any) -> Any:
            self.calls.append([None if t is None else (t.data_ptr(), t.stride()) for t in tensors])
            return original(*tensors, **options)

        monkeypatch.setattr(module, name, spy)


def place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def test_channel_last_views_reach_the_kernels_uncopied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strides that Transformers' layers have: (batch, channels, length) lying as (batch, length, channels)."""
    scans, convs = Seen(monkeypatch, scan_cpu, "forward"), Seen(monkeypatch, conv_cpu, "forward")
    given = inner_arguments()
    xz = given["xz"]
    mamba_inner_fn(**given)
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    assert convs.calls[0][0] == place(x)
    assert scans.calls[0][6] == place(z)

    u, delta, A, B, C, D, z, bias = arguments()
    rows = torch.randn(BATCH, LENGTH, 2 + 2 * STATE)
    B, C = (part.transpose(1, 2) for part in rows.split([2, STATE, STATE], dim=-1)[1:])
    u, delta, z = (torch.randn(BATCH, LENGTH, CHANNELS).transpose(1, 2) for _ in range(3))
    out = selective_scan_fn(u, delta, A, B, C, D, z, bias, True)
    seen = scans.calls[1]
    for index, tensor in ((0, u), (1, delta), (6, z)):
        assert seen[index] == place(tensor.transpose(1, 2))
    for index, tensor in ((3, B), (4, C)):
        assert seen[index] == place(tensor.transpose(1, 2).unsqueeze(2))
    assert out.transpose(1, 2).is_contiguous()

"""Layers other than the published Mamba's in the compiled step, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import ArgumentError, BackendError
from longscan.ops.int8 import quantize
from longscan.ops.mamba_step import MambaDecoder, MambaStepWeights, MlpStepWeights, VectorProducts
from tests.ops.mamba_step.test_decoder import assert_close, double, exact, rms_norm

MODEL, INNER, STATES, RANK, WIDTH = 24, 40, 5, 3, 4

#: From the norm's input to what a layer adds to the stream, and the states after it.
Layer = Callable[[Tensor, Any], tuple[Tensor, Any]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    values = torch.randn(shape) / shape[-1] ** 0.5
    return quantize(values) if dtype == torch.int8 else values.to(dtype)


def mamba(heads: int, paired: bool, normed: bool, bias: bool = True) -> MambaStepWeights:
    return MambaStepWeights(
        norm=1 + 0.1 * torch.randn(MODEL),
        in_proj=matrix(2 * INNER, MODEL),
        in_proj_bias=torch.randn(2 * INNER) if bias else None,
        conv=torch.randn(INNER, WIDTH) / 2,
        x_proj=matrix(heads * (RANK + 2 * STATES), INNER // heads),
        dt_proj=matrix(INNER, RANK),
        dt_bias=torch.randn(INNER) - 2,
        A=-4 * torch.rand(INNER, STATES),
        out_proj=matrix(MODEL, INNER),
        D=torch.randn(INNER),
        selection_norm=1 + 0.1 * torch.randn(RANK + 2 * STATES) if normed else None,
        heads=heads,
        paired=paired,
        selection_eps=1e-3,
    )


def mamba_layer(w: MambaStepWeights) -> Layer:
    def layer(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        conv, ssm = (part.double() for part in state)
        xz = F.linear(rms_norm(x, w.norm.double(), w.eps), exact(w.in_proj), double(w.in_proj_bias))
        u, z = xz.unflatten(1, (-1, 2)).unbind(-1) if w.paired else xz.chunk(2, -1)
        window = torch.cat([conv, u[:, None]], 1)
        u = F.silu(torch.einsum("bkc,ck->bc", window, w.conv.double()))
        parts = []
        for head, own in enumerate(u.chunk(w.heads, -1)):
            rows = exact(w.x_proj).chunk(w.heads)[head]
            dt, B, C = F.linear(own, rows).split([RANK, STATES, STATES], -1)
            if w.selection_norm is not None:
                scales = w.selection_norm.double().split([RANK, STATES, STATES])
                dt, B, C = (rms_norm(v, g, w.selection_eps) for v, g in zip((dt, B, C), scales, strict=True))
            shares = (exact(w.dt_proj), w.dt_bias.double(), w.A.double(), ssm.transpose(0, 1))
            weight, bias, A, h = (part.chunk(w.heads)[head] for part in shares)
            delta = F.softplus(F.linear(dt, weight, bias))
            after = torch.exp(delta[..., None] * A) * h.transpose(0, 1) + (delta * own)[..., None] * B[:, None]
            parts.append((after, torch.einsum("bcn,bn->bc", after, C)))
        assert w.D is not None
        after, y = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return F.linear((y + w.D * u) * F.silu(z), exact(w.out_proj)), (window[:, 1:], after)

    return layer


def mlp(dtype: torch.dtype = torch.float32, width: int = 37) -> MlpStepWeights:
    gate, up, down = (matrix(*shape, dtype=dtype) for shape in ((width, MODEL), (width, MODEL), (MODEL, width)))
    return MlpStepWeights(1 + 0.1 * torch.randn(MODEL), gate, up, down, eps=1e-2)


def mlp_layer(w: MlpStepWeights) -> Layer:
    def layer(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        x = rms_norm(x, w.norm.double(), w.eps)
        return F.linear(F.linear(x, exact(w.up)) * F.silu(F.linear(x, exact(w.gate))), exact(w.down)), state

    return layer


def experts(number: int, chosen: int, dtype: torch.dtype = torch.float32, width: int = 37) -> MlpStepWeights:
    gate, up = matrix(number, 2 * width, MODEL, dtype=dtype).chunk(2, dim=1)
    down, router = matrix(number, MODEL, width, dtype=dtype), matrix(number, MODEL, dtype=dtype)
    return MlpStepWeights(1 + 0.1 * torch.randn(MODEL), gate, up, down, router, chosen)


def experts_layer(w: MlpStepWeights) -> Layer:
    def layer(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert w.router is not None
        x = rms_norm(x, w.norm.double(), w.eps)
        weights, indices = F.linear(x, w.router.double()).softmax(-1).topk(w.chosen)
        rows = []
        for row, own, picked in zip(x, weights, indices, strict=True):
            outputs = [exact(w.down)[e] @ (exact(w.up)[e] @ row * F.silu(exact(w.gate)[e] @ row)) for e in picked]
            rows.append(sum(weight * output for weight, output in zip(own, outputs, strict=True)))
        return torch.stack(rows), state

    return layer


def definition(weights: Any) -> Layer:
    if isinstance(weights, MambaStepWeights):
        return mamba_layer(weights)
    return mlp_layer(weights) if weights.router is None else experts_layer(weights)


CASES: dict[str, Callable[[], list[Any]]] = {
    "norms": lambda: [mamba(1, False, True), mamba(1, False, True)],
    "heads": lambda: [mamba(2, True, False), mamba(2, True, False, bias=False)],
    "many-heads": lambda: [mamba(5, True, True)],
    "mlp": lambda: [mamba(1, False, False), mlp(), mlp(width=5)],
    "mlp-bfloat16": lambda: [mlp(torch.bfloat16)],
    "mlp-int8": lambda: [mlp(torch.int8)],
    "mlps-alone": lambda: [mlp(), experts(3, 1)],
    "experts": lambda: [mamba(1, False, True), experts(4, 2), mamba(1, False, True), experts(4, 4, width=50)],
    "experts-bfloat16": lambda: [experts(5, 3, torch.bfloat16)],
}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("beside", [False, True])
def test_agrees_with_float64(name: str, batch: int, beside: bool) -> None:
    layers = CASES[name]()
    own = [
        (torch.randn(batch, WIDTH - 1, INNER), torch.randn(batch, INNER, STATES))
        for layer in layers
        if isinstance(layer, MambaStepWeights)
    ]
    before = [(conv.clone(), ssm.clone()) for conv, ssm in own]
    hidden, residual = torch.randn(batch, MODEL), torch.randn(batch, MODEL)
    aside = torch.randn(batch, MODEL) if beside else None
    got, stream = MambaDecoder(layers).step_hidden(hidden, residual, own, aside)
    x, total, states = hidden.double(), residual.double(), iter(before)
    for i, layer in enumerate(layers):
        total = total + x
        x = total + aside if i == 0 and aside is not None else total
        state = next(states) if isinstance(layer, MambaStepWeights) else None
        x, after = definition(layer)(x, state)
        if state is not None:
            moved = own.pop(0)
            for one, other in zip(moved, after, strict=True):
                assert_close(one, other)
    assert_close(got, x)
    assert_close(stream, total)


def test_the_head_after_layers() -> None:
    layers, head, norm = [mlp()], matrix(30, MODEL), torch.ones(MODEL)
    decoder = MambaDecoder(layers, final_norm=norm, head=head)
    hidden = torch.randn(3, MODEL)
    y, _ = mlp_layer(layers[0])(hidden.double(), None)
    expected = rms_norm(hidden + y, norm.double(), 1e-5) @ head.double().t()
    assert_close(decoder.step_to_logits(hidden, None, []), expected)
    with pytest.raises(ArgumentError, match="head, final_norm: this decoder was made without"):
        MambaDecoder(layers).step_to_logits(hidden, None, [])


def test_scores_that_are_no_numbers_choose_somebody() -> None:
    """What comes out is no number either, and no memory is read that is not there."""
    decoder = MambaDecoder([experts(4, 3)])
    got, _ = decoder.step_hidden(torch.full((2, MODEL), torch.nan), None, [])
    assert got.isnan().all()


def test_equal_scores_choose_as_many_experts() -> None:
    w = experts(6, 3)
    assert w.router is not None
    w.router.zero_()
    x = torch.randn(1, MODEL)
    got, _ = MambaDecoder([w]).step_hidden(x, None, [])
    first = rms_norm(x[0].double(), w.norm.double(), w.eps)
    each = [w.down[e].double() @ (exact(w.up)[e] @ first * F.silu(exact(w.gate)[e] @ first)) for e in range(3)]
    assert_close(got[0], sum(each) / 6)


def test_what_does_not_fit_is_refused() -> None:
    w = mlp()
    with pytest.raises(ArgumentError, match=r"down: got shape \(24, 30\), expected \(24, 37\)"):
        MlpStepWeights(w.norm, w.gate, w.up, torch.zeros(MODEL, 30))
    with pytest.raises(ArgumentError, match="gate: got shape"):
        MlpStepWeights(w.norm, torch.zeros(3), w.up, w.down)
    e = experts(4, 2)
    with pytest.raises(ArgumentError, match="chosen: got 5, allowed are 1 to 4"):
        MlpStepWeights(e.norm, e.gate, e.up, e.down, e.router, 5)
    with pytest.raises(BackendError, match="gate, up: expected the two halves"):
        MlpStepWeights(e.norm, e.gate.contiguous(), e.up, e.down, e.router, 2)
    with pytest.raises(BackendError, match="down: strides"):
        MlpStepWeights(w.norm, w.gate, w.up, torch.zeros(37, MODEL).t())
    with pytest.raises(ArgumentError, match="eps: got -1"):
        MlpStepWeights(w.norm, w.gate, w.up, w.down, eps=-1)
    own = {name: getattr(mamba(1, False, True), name) for name in MambaStepWeights.__match_args__}
    with pytest.raises(ArgumentError, match="heads: got 3, expected a divisor"):
        MambaStepWeights(**{**own, "heads": 3})
    with pytest.raises(ArgumentError, match=r"selection_norm: got shape \(2,\)"):
        MambaStepWeights(**{**own, "selection_norm": torch.ones(2)})
    with pytest.raises(ArgumentError, match="expected one for each of 0 layers of Mamba"):
        MambaDecoder([w]).step_hidden(torch.zeros(1, MODEL), None, [(torch.zeros(1), torch.zeros(1))])
    with pytest.raises(ArgumentError, match="aside: got shape"):
        MambaDecoder([w]).step_hidden(torch.zeros(1, MODEL), None, [], torch.zeros(2, MODEL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 6])
def test_products_of_vectors(batch: int, dtype: torch.dtype) -> None:
    matrices = [matrix(rows, 70, dtype=dtype) for rows in (33, 1, 8)]
    x = torch.randn(batch, 70)
    for got, weights in zip(VectorProducts(matrices)(x), matrices, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, x.double() @ weights.double().t())


def test_products_refuse() -> None:
    with pytest.raises(ArgumentError, match="matrices: got shapes"):
        VectorProducts([])
    with pytest.raises(ArgumentError, match="matrices: got shapes"):
        VectorProducts([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(BackendError, match=r"matrices\[0\]: strides"):
        VectorProducts([torch.zeros(3, 2).t()])
    with pytest.raises(ArgumentError, match=r"x: got shape \(1, 2\)"):
        VectorProducts([torch.zeros(2, 3)])(torch.zeros(1, 2))

"""The compiled step against the same arithmetic in plain PyTorch and float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import ArgumentError, BackendError
from longscan.ops.int8 import Int8Matrix, dequantize, quantize
from longscan.ops.mamba_step import MambaDecoder, MambaStepWeights, mamba_block_step
from longscan.ops.mamba_step.decoder import State
from longscan.ops.mamba_step.matrices import Matrix

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Case:
    """A model; `biases` gives every projection one, `optional` the convolution's and the skip."""

    name: str
    layers: int = 2
    d_model: int = 32
    d_inner: int = 64
    d_state: int = 16
    dt_rank: int = 3
    d_conv: int = 4
    vocabulary: int = 50
    biases: bool = False
    optional: bool = True
    tied: bool = True
    eps: float = 1e-5
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32


CASES = (
    Case("mamba"),
    Case("one-layer", layers=1),
    Case("odd", d_model=27, d_inner=53, d_state=5, dt_rank=1, vocabulary=19, layers=3),
    Case("wide-state", d_state=40, dt_rank=35, d_inner=48),
    Case("one-state", d_state=1),
    Case("width-1", d_conv=1),
    Case("width-2", d_conv=2),
    Case("width-7", d_conv=7),
    Case("biases", biases=True),
    Case("bare", optional=False),
    Case("untied", tied=False, biases=True, eps=1e-2),
    Case("bfloat16", dtype=torch.bfloat16, state_dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16, state_dtype=torch.float16),
    Case("bfloat16-odd", d_model=27, d_inner=53, d_state=5, dtype=torch.bfloat16),
    Case("int8", d_model=160, d_inner=256, dt_rank=10, biases=True, dtype=torch.int8),
    Case("int8-odd", d_model=131, d_inner=300, d_state=5, dt_rank=1, tied=False, dtype=torch.int8),
)
BY_NAME = {case.name: case for case in CASES}
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Model:
    """Random weights of a case; `step` is the definition."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, self._generator = case, torch.Generator().manual_seed(seed)
        c = case
        self.layers = [
            MambaStepWeights(
                norm=1 + 0.1 * self.normal(c.d_model),
                in_proj=self.matrix(2 * c.d_inner, c.d_model),
                conv=self.normal(c.d_inner, c.d_conv) / 2,
                x_proj=self.matrix(c.dt_rank + 2 * c.d_state, c.d_inner),
                dt_proj=self.matrix(c.d_inner, c.dt_rank),
                dt_bias=self.normal(c.d_inner) - 2,
                A=-self.normal(c.d_inner, c.d_state).abs() * 4,
                out_proj=self.matrix(c.d_model, c.d_inner),
                D=self.normal(c.d_inner) if c.optional else None,
                conv_bias=0.1 * self.normal(c.d_inner) if c.optional else None,
                in_proj_bias=0.1 * self.normal(2 * c.d_inner) if c.biases else None,
                out_proj_bias=0.1 * self.normal(c.d_model) if c.biases else None,
                eps=c.eps,
            )
            for _ in range(c.layers)
        ]
        self.embedding = self.matrix(c.vocabulary, c.d_model)
        self.head = None if c.tied else self.matrix(c.vocabulary + 3, c.d_model)
        self.head_bias = self.normal(c.vocabulary + 3) if c.biases and not c.tied else None
        self.norm = 1 + 0.1 * self.normal(c.d_model)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def matrix(self, *shape: int) -> Any:
        matrix = self.normal(*shape) / shape[-1] ** 0.5
        return quantize(matrix) if self.case.dtype == torch.int8 else matrix.to(self.case.dtype)

    def decoder(self) -> MambaDecoder:
        return MambaDecoder(
            self.layers,
            embedding=self.embedding,
            final_norm=self.norm,
            head=self.head,
            head_bias=self.head_bias,
            eps=self.case.eps,
        )

    def states(self, batch: int) -> list[State]:
        c = self.case
        return [
            (self.normal(batch, c.d_conv - 1, c.d_inner).to(c.state_dtype), self.normal(batch, c.d_inner, c.d_state))
            for _ in self.layers
        ]

    def layer(self, w: MambaStepWeights, hidden: Tensor, stream: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """One layer in float64."""
        c = self.case
        conv, ssm = state
        stream = stream + hidden
        xz = F.linear(rms_norm(stream, w.norm, w.eps), exact(w.in_proj), double(w.in_proj_bias))
        x, z = xz.chunk(2, -1)
        window = torch.cat([conv, x[:, None]], 1)
        x = torch.einsum("bkc,ck->bc", window, w.conv.double())
        x = F.silu(x if w.conv_bias is None else x + w.conv_bias)
        dt, B, C = F.linear(x, exact(w.x_proj)).split([c.dt_rank, c.d_state, c.d_state], -1)
        delta = F.softplus(F.linear(dt, exact(w.dt_proj), double(w.dt_bias)))
        ssm = torch.exp(delta[..., None] * w.A) * ssm + (delta * x)[..., None] * B[:, None]
        y = torch.einsum("bcn,bn->bc", ssm, C)
        y = (y if w.D is None else y + w.D * x) * F.silu(z)
        return F.linear(y, exact(w.out_proj), double(w.out_proj_bias)), stream, (window[:, 1:], ssm)

    def step(self, tokens: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Logits and states in float64."""
        hidden = exact(self.embedding)[tokens]
        stream, after = torch.zeros_like(hidden), []
        for w, (conv, ssm) in zip(self.layers, states, strict=True):
            hidden, stream, state = self.layer(w, hidden, stream, (conv.double(), ssm.double()))
            after.append(state)
        head = self.embedding if self.head is None else self.head
        return F.linear(rms_norm(stream + hidden, self.norm, self.case.eps), exact(head), double(self.head_bias)), after


def exact(matrix: Matrix) -> Tensor:
    """What the numbers of a matrix say, in float64."""
    if not isinstance(matrix, Int8Matrix):
        return matrix.double()
    return dequantize(matrix.values, matrix.scales.double())


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def clone(states: list[State]) -> list[State]:
    return [(conv.clone(), ssm.clone()) for conv, ssm in states]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("batch", [1, 3, 6])
@CASE
def test_agrees_with_float64(case: Case, batch: int) -> None:
    """Logits and states of three tokens in a row; the weights' rounding is not an error, the arithmetic's is."""
    model = Model(case)
    decoder, ours = model.decoder(), model.states(batch)
    truth: list[State] = clone(ours)
    for t in range(3):
        tokens = torch.arange(batch) * 7 % case.vocabulary + t
        logits = decoder.step(tokens, ours)
        expected, truth = model.step(tokens, truth)
        # A convolution state in a short format rounds what it keeps.
        coarse = (
            1e-2 if case.state_dtype == torch.bfloat16 else 2e-3 if case.state_dtype == torch.float16 else TOLERANCE
        )
        assert logits.dtype == torch.float32
        assert_close(logits, expected, TOLERANCE if t == 0 else coarse)
        for (conv, ssm), (conv_truth, ssm_truth) in zip(ours, truth, strict=True):
            assert_close(conv, conv_truth, coarse)
            assert_close(ssm, ssm_truth, TOLERANCE if t == 0 else coarse)


@pytest.mark.parametrize("name", ["mamba", "odd", "bfloat16", "int8", "int8-odd"])
def test_a_row_does_not_depend_on_its_company(name: str) -> None:
    model = Model(BY_NAME[name])
    decoder, states = model.decoder(), model.states(7)
    tokens = torch.arange(7)
    alone = [[(conv[i : i + 1].clone(), ssm[i : i + 1].clone()) for conv, ssm in states] for i in range(7)]
    logits = decoder.step(tokens, states)
    for i in range(7):
        assert torch.equal(decoder.step(tokens[i : i + 1], alone[i])[0], logits[i])
        for (conv, ssm), (conv_alone, ssm_alone) in zip(states, alone[i], strict=True):
            assert torch.equal(conv[i], conv_alone[0])
            assert torch.equal(ssm[i], ssm_alone[0])


def test_the_number_of_threads_changes_nothing() -> None:
    model = Model(Case("larger", d_model=96, d_inner=200, vocabulary=333, layers=4))
    decoder, first = model.decoder(), model.states(2)
    tokens = torch.tensor([1, 2])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            states = clone(first)
            results.append([decoder.step(tokens, states), *(t for state in states for t in state)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layers_one_by_one_are_the_model() -> None:
    model = Model(BY_NAME["biases"])
    decoder, whole = model.decoder(), model.states(2)
    single, layers = clone(whole), clone(whole)
    tokens = torch.tensor([4, 5])
    logits = decoder.step(tokens, whole)
    hidden, residual = model.embedding[tokens], None
    for weights, (conv, ssm) in zip(model.layers, single, strict=True):
        hidden, residual = mamba_block_step(hidden, residual, weights, conv, ssm)
    assert residual is not None
    again = decoder.step_hidden(model.embedding[tokens], None, layers)
    assert torch.equal(hidden, again[0])
    assert torch.equal(residual, again[1])
    for a, b, c in zip(whole, single, layers, strict=True):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))
    normed = rms_norm((hidden + residual).double(), model.norm, model.case.eps)
    assert_close(logits, normed @ model.embedding.double().t())


def test_hidden_keeps_its_dtype_and_the_inputs_their_values() -> None:
    model = Model(BY_NAME["bfloat16"])
    (conv, ssm) = model.states(2)[0]
    hidden, residual = torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(2, 32)
    out, stream = mamba_block_step(hidden, residual, model.layers[0], conv, ssm)
    assert out.dtype == torch.bfloat16
    assert stream.dtype == torch.float32
    assert torch.equal(stream, torch.full((2, 32), 2.0))
    assert torch.equal(hidden, torch.ones_like(hidden))
    assert torch.equal(residual, torch.ones_like(residual))


def test_uses_the_matrices_where_they_lie_and_copies_of_the_rest() -> None:
    model = Model(BY_NAME["mamba"])
    decoder = model.decoder()
    tokens = torch.tensor([3])
    before = decoder.step(tokens, model.states(1))
    model.embedding.mul_(2)
    assert not torch.equal(decoder.step(tokens, model.states(1)), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_proj": torch.zeros(128, 31)}, r"norm: got shape \(32,\), expected \(31,\)"),
        ({"conv": torch.zeros(63, 4)}, r"conv: got shape \(63, 4\), expected \(64, 4\)"),
        ({"conv": torch.zeros(64, 1, 4)}, r"conv: got shape \(64, 1, 4\)"),
        ({"D": torch.zeros(3)}, r"D: got shape \(3,\)"),
        ({"eps": -1.0}, "eps: got -1.0"),
    ],
)
def test_weights_refuse_what_does_not_fit(change: dict, message: str) -> None:
    weights = Model(BY_NAME["mamba"]).layers[0]
    with pytest.raises(ArgumentError, match=message):
        MambaStepWeights(**{**arguments(weights), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(64, 16, dtype=torch.complex64)}, "A: got torch.complex64"),
        ({"in_proj": torch.zeros(128, 32, dtype=torch.float64)}, "in_proj: got torch.float64"),
        ({"in_proj": torch.zeros(32, 128).t()}, "in_proj: strides"),
        ({"D": torch.zeros(64, device="meta")}, "D: .*on meta"),
    ],
)
def test_weights_say_what_the_step_cannot_read(change: dict, message: str) -> None:
    weights = Model(BY_NAME["mamba"]).layers[0]
    with pytest.raises(BackendError, match=message):
        MambaStepWeights(**{**arguments(weights), **change})


def arguments(weights: MambaStepWeights) -> dict:
    return {name: value for name, value in vars(weights).items() if name in MambaStepWeights.__match_args__}


def test_decoder_refuses_what_does_not_fit() -> None:
    model = Model(BY_NAME["mamba"])
    decoder, tokens = model.decoder(), torch.tensor([1])
    with pytest.raises(ArgumentError, match="layers: got none"):
        MambaDecoder([])
    with pytest.raises(ArgumentError, match="layers: layer 1 has"):
        MambaDecoder([model.layers[0], Model(BY_NAME["one-state"]).layers[0]])
    with pytest.raises(ArgumentError, match=r"head: got shape \(5, 3\)"):
        MambaDecoder(model.layers, embedding=model.embedding, head=torch.zeros(5, 3))
    with pytest.raises(ArgumentError, match="without them"):
        MambaDecoder(model.layers).step(tokens, model.states(1))
    with pytest.raises(ArgumentError, match=r"tokens: got \[50\], allowed are 0 to 49"):
        decoder.step(torch.tensor([50]), model.states(1))
    with pytest.raises(ArgumentError, match=r"tokens: got \[-1\]"):
        decoder.step(torch.tensor([-1]), model.states(1))
    with pytest.raises(ArgumentError, match="states: got 1, expected one for each of 2 layers"):
        decoder.step(tokens, model.states(1)[:1])
    with pytest.raises(ArgumentError, match="conv_state of layer 0"):
        decoder.step(tokens, model.states(2))
    conv, ssm = model.states(1)[0]
    with pytest.raises(ArgumentError, match="ssm_state of layer 1"):
        decoder.step(tokens, [(conv, ssm), (conv, ssm.double())])


def test_different_sizes_of_batch_take_turns() -> None:
    model = Model(replace(BY_NAME["mamba"], layers=3))
    decoder = model.decoder()
    for batch in (2, 1, 5, 2):
        states = model.states(batch)
        expected, _ = model.step(torch.arange(batch), clone(states))
        assert_close(decoder.step(torch.arange(batch), states), expected)

"""The Mamba module and the block: parameters, the definition, the cache, one token after another."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan import mixers
from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.block import Block, GatedMLP
from longscan.integrations.mamba_ssm.generation import InferenceParams
from longscan.integrations.mamba_ssm.module import Mamba
from longscan.integrations.mamba_ssm.norm import RMSNorm
from tests.integrations.mamba_ssm import formulas
from tests.integrations.mamba_ssm.test_scan import inner

OPTIONS: list[dict[str, Any]] = [
    {},
    {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 2, "bias": True, "conv_bias": False, "dt_init": "constant"},
    {"d_conv": 7, "expand": 1.5, "use_fast_path": False},
]


def make(**options: Any) -> Mamba:
    torch.manual_seed(0)
    return Mamba(8, layer_idx=0, **options)


def written_out(mixer: Mamba, x: Tensor) -> Tensor:
    """By the definition of `mamba_inner_fn`, in float64."""
    weights = {name: tensor.detach().double() for name, tensor in mixer.state_dict().items()}
    xz = torch.einsum("ed,bld->bel", weights["in_proj.weight"], x.double())
    if "in_proj.bias" in weights:
        xz = xz + weights["in_proj.bias"][:, None]
    return inner(
        xz, weights["conv1d.weight"], weights.get("conv1d.bias"), weights["x_proj.weight"], weights["dt_proj.weight"],
        weights["out_proj.weight"], weights.get("out_proj.bias"), -torch.exp(weights["A_log"]), D=weights["D"],
        delta_bias=weights["dt_proj.bias"],
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_is_its_definition(options: dict[str, Any]) -> None:
    mixer = make(**options)
    x = torch.randn(2, 9, 8)
    formulas.close(mixer(x), written_out(mixer, x))


def test_parameters_marks_and_attributes() -> None:
    mixer = make()
    shapes = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert shapes == {
        "A_log": (16, 16), "D": (16,), "in_proj.weight": (32, 8), "conv1d.weight": (16, 1, 4), "conv1d.bias": (16,),
        "x_proj.weight": (1 + 32, 16), "dt_proj.weight": (16, 1), "dt_proj.bias": (16,), "out_proj.weight": (8, 16),
    }  # fmt: skip
    assert mixer.dt_proj.bias._no_reinit
    assert mixer.A_log._no_weight_decay
    assert mixer.D._no_weight_decay
    own = (mixer.d_model, mixer.d_state, mixer.d_conv, mixer.expand, mixer.d_inner, mixer.dt_rank, mixer.activation)
    assert own == (8, 16, 4, 2, 16, 1, "silu")
    half = make(dtype=torch.bfloat16)
    assert half.A_log.dtype == half.D.dtype == torch.float32
    assert half.in_proj.weight.dtype == half.dt_proj.bias.dtype == torch.bfloat16
    steps = torch.nn.functional.softplus(make(dt_min=0.01, dt_max=0.02).dt_proj.bias)
    assert steps.min() >= 0.0099
    assert steps.max() <= 0.0201


def test_weights_are_those_of_our_mixer() -> None:
    theirs, ours = make(bias=True), mixers.Mamba(8, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(theirs(x), ours(x)[0])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("prompt", [1, 2, 8])
def test_prompt_chunk_and_steps_are_the_whole(options: dict[str, Any], prompt: int) -> None:
    mixer, x = make(**options), torch.randn(2, 13, 8)
    cache = InferenceParams(max_seqlen=13, max_batch_size=2)
    parts = []
    with torch.no_grad():
        for start, end in ((0, prompt), (prompt, prompt + 3), *((t, t + 1) for t in range(prompt + 3, 13))):
            parts.append(mixer(x[:, start:end], inference_params=cache))
            cache.seqlen_offset = end
        torch.testing.assert_close(torch.cat(parts, dim=1), mixer(x), rtol=1e-4, atol=1e-5)
    conv_state, ssm_state = cache.key_value_memory_dict[0]
    assert conv_state.shape == (2, mixer.d_inner, mixer.d_conv)
    inputs = mixer.in_proj(x).chunk(2, dim=-1)[0].transpose(1, 2)
    torch.testing.assert_close(conv_state, inputs[..., 13 - mixer.d_conv :])
    assert ssm_state.shape == (2, mixer.d_inner, mixer.d_state)


def test_steps_update_the_states_they_are_given() -> None:
    mixer, x = make(), torch.randn(2, 5, 8)
    states = mixer.allocate_inference_cache(2, 5)
    with torch.no_grad():
        for t in range(5):
            out, *same = mixer.step(x[:, t : t + 1], *states)
            assert same[0] is states[0]
            assert same[1] is states[1]
        torch.testing.assert_close(out[:, 0], mixer(x)[:, -1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="forward takes more tokens"):
        mixer.step(x, *states)


def test_gradients_flow_through_the_cache() -> None:
    mixer, x = make(), torch.randn(2, 7, 8)
    cache = InferenceParams(max_seqlen=7, max_batch_size=2)
    parts = []
    for start, end in ((0, 3), (3, 5), (5, 6), (6, 7)):
        parts.append(mixer(x[:, start:end], cache))
        cache.seqlen_offset = end
    weights = torch.randn(2, 7, 8)
    parameters = list(mixer.parameters())
    found = torch.autograd.grad((torch.cat(parts, dim=1) * weights).sum(), parameters)
    for got, expected in zip(found, torch.autograd.grad((mixer(x) * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_states_of_the_recurrence_are_never_in_half_precision() -> None:
    mixer = make(dtype=torch.bfloat16)
    assert [state.dtype for state in mixer.allocate_inference_cache(1, 1)] == [torch.bfloat16, torch.float32]
    assert [state.dtype for state in mixer.allocate_inference_cache(1, 1, torch.float16)] == [
        torch.float16,
        torch.float32,
    ]
    cache = InferenceParams(max_seqlen=4, max_batch_size=1)
    with torch.no_grad():
        mixer(torch.randn(1, 3, 8).bfloat16(), cache)
        cache.seqlen_offset = 3
        assert mixer(torch.randn(1, 1, 8).bfloat16(), cache).dtype == torch.bfloat16
    assert cache.key_value_memory_dict[0][1].dtype == torch.float32


def test_the_cache() -> None:
    mixer, cache = make(), InferenceParams(max_seqlen=4, max_batch_size=2)
    states = mixer._get_states_from_cache(cache, 2)
    states[0].fill_(1)
    assert mixer._get_states_from_cache(cache, 2)[0] is states[0]
    assert not mixer._get_states_from_cache(cache, 2, initialize_states=True)[0].any()
    cache.seqlen_offset, cache.lengths_per_sample = 3, torch.ones(2)
    cache.reset(9, 1)
    assert (cache.max_seqlen, cache.max_batch_size, cache.seqlen_offset) == (9, 1, 0)
    assert not cache.lengths_per_sample.any()
    with pytest.raises(ArgumentError, match="give each layer its own number"):
        Mamba(8)(torch.randn(1, 1, 8), cache)


def test_words_that_are_not_known() -> None:
    with pytest.raises(ArgumentError, match="dt_init"):
        Mamba(8, dt_init="zero")
    with pytest.raises(ArgumentError, match="dt_rank"):
        Mamba(8, dt_rank="half")


def test_autocast() -> None:
    mixer, x = make(), torch.randn(2, 5, 8)
    cache = InferenceParams(max_seqlen=6, max_batch_size=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outs = [mixer(x[:, :4], cache)]
        cache.seqlen_offset = 4
        outs.append(mixer(x[:, 4:], cache))
    formulas.close(torch.cat(outs, dim=1).double(), written_out(mixer, x), 5e-2)


# The block


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_fused_or_not_a_block_is_the_same(norm: Any, mlp: bool, residual_in_fp32: bool) -> None:
    def block(fused: bool) -> Block:
        torch.manual_seed(0)
        mlp_cls = partial(GatedMLP, hidden_features=100, out_features=8) if mlp else nn.Identity
        return Block(8, partial(Mamba, layer_idx=0), mlp_cls, norm, fused, residual_in_fp32)

    x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    plain, fused = block(False), block(True)
    for given in (residual, None):
        out, stream = plain(x, given)
        also, same = fused(x, given)
        torch.testing.assert_close(out, also)
        torch.testing.assert_close(stream, same)
    total = x + residual
    if mlp:
        total = total + plain.mixer(plain.norm(total))
        torch.testing.assert_close(plain(x, residual)[0], plain.mlp(plain.norm2(total)))
    else:
        torch.testing.assert_close(plain(x, residual)[0], plain.mixer(plain.norm(total)))
    torch.testing.assert_close(plain(x, residual)[1], total)
    assert plain.allocate_inference_cache(2, 1)[0].shape == (2, 16, 4)


def test_a_fused_block_needs_a_norm_it_knows() -> None:
    with pytest.raises(ArgumentError, match="LayerNorm or RMSNorm is needed"):
        Block(8, Mamba, norm_cls=lambda dim: nn.BatchNorm1d(dim), fused_add_norm=True)


def test_the_mlp_is_rounded_up() -> None:
    mlp = GatedMLP(8, 100)
    assert mlp.fc1.weight.shape == (256, 8)
    assert mlp.fc2.weight.shape == (8, 128)
    assert GatedMLP(48, multiple_of=16).fc2.weight.shape == (48, 128)
    x = torch.randn(3, 8)
    value, gate = mlp.fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.fc2(value * gate * torch.sigmoid(gate)))

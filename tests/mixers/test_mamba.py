"""Mamba: parameters as released, the initialisations of the paper, the block against its equations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import Mamba
from longscan.mixers.mamba import MambaState
from longscan.models import LanguageModel, LanguageModelConfig


def written_out(mixer: Mamba, x: Tensor) -> Tensor:
    """The module docstring's equations, one time step after another."""
    A, (u, z) = mixer.A, mixer.in_proj(x).chunk(2, dim=-1)
    padded = F.pad(u, (0, 0, mixer.d_conv - 1, 0))
    bias = 0 if mixer.conv1d.bias is None else mixer.conv1d.bias
    taps = mixer.conv1d.weight[:, 0]
    u = F.silu(sum(padded[:, k : k + x.shape[1]] * taps[:, k] for k in range(mixer.d_conv)) + bias)
    selected = mixer.x_proj(u)
    dt = F.softplus(mixer.dt_proj(selected[..., : mixer.dt_rank]))
    B, C = selected[..., mixer.dt_rank :].chunk(2, dim=-1)
    if mixer.is_complex:
        B, C = torch.complex(B[..., 0::2], B[..., 1::2]), torch.complex(C[..., 0::2], C[..., 1::2])
    h, outputs = torch.zeros(x.shape[0], *A.shape, dtype=A.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        y = (C[:, t, None, :] * h).sum(-1)
        outputs.append((2 * y.real if mixer.is_complex else y) + mixer.D * u[:, t])
    return mixer.out_proj(torch.stack(outputs, dim=1) * F.silu(z))


@pytest.mark.parametrize("a_init", ["s4d-real", "constant", "random", "s4d-lin"])
@pytest.mark.parametrize("options", [{}, {"d_conv": 2, "conv_bias": False, "bias": True, "dt_rank": 3}])
def test_the_block_is_its_equations(a_init: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    mixer = Mamba(6, d_state=4, a_init=a_init, **options).double()  # type: ignore[arg-type]
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], written_out(mixer, x), rtol=1e-9, atol=1e-10)


def test_parameters_are_those_of_the_released_models() -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in Mamba(32, d_state=16).named_parameters()}
    assert shapes == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 32, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


def test_a_complex_model_is_as_large_as_a_real_one() -> None:
    real, unreal = Mamba(32, d_state=16), Mamba(32, d_state=16, a_init="s4d-lin")
    assert real.state_bytes(2) == unreal.state_bytes(2)
    assert sum(p.numel() for p in real.parameters()) == sum(p.numel() for p in unreal.parameters())


def test_initialisations_of_A() -> None:
    n = torch.arange(4.0)
    torch.testing.assert_close(Mamba(8, d_state=4).A, -(n + 1).expand(16, 4))
    torch.testing.assert_close(Mamba(8, d_state=4, a_init="constant").A, torch.full((16, 4), -0.5))
    lin = Mamba(8, d_state=8, a_init="s4d-lin").A
    torch.testing.assert_close(lin, torch.complex(torch.tensor(-0.5), n).expand(16, 4))
    torch.manual_seed(0)
    drawn = Mamba(64, a_init="random").A_log
    assert abs(drawn.mean()) < 0.1
    assert abs(drawn.std() - 1) < 0.1


def test_steps_start_between_their_bounds() -> None:
    torch.manual_seed(0)
    steps = F.softplus(Mamba(512, dt_min=0.001, dt_max=0.1).dt_proj.bias).detach()
    assert steps.min() >= 0.001 * 0.999
    assert steps.max() <= 0.1 * 1.001
    # Log-uniform: half of them below the geometric mean.
    assert abs((steps < 0.01).float().mean() - 0.5) < 0.06
    assert F.softplus(Mamba(8, dt_min=1e-6, dt_max=1e-6, dt_init_floor=1e-4).dt_proj.bias)[0].item() == pytest.approx(
        1e-4
    )


def test_dt_projection_starts() -> None:
    assert Mamba(64, dt_rank=4, dt_scale=2.0).dt_proj.weight.abs().max() <= 2 * 4**-0.5
    assert (Mamba(64, dt_rank=4, dt_init="constant").dt_proj.weight == 4**-0.5).all()
    assert Mamba(100).dt_rank == math.ceil(100 / 16)


def test_marks_for_optimiser_and_precision() -> None:
    mixer = Mamba(16).to(torch.bfloat16)
    assert mixer.A_log._no_weight_decay  # type: ignore[attr-defined]
    assert mixer.D._no_weight_decay  # type: ignore[attr-defined]
    assert mixer.dt_proj.bias._no_reinit  # type: ignore[attr-defined]
    kept = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
    assert all(parameter.dtype == torch.float64 for parameter in mixer.double().parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"a_init": "hippo"}, "a_init must be one of s4d-real"),
        ({"a_init": "s4d-lin", "d_state": 5}, "even"),
        ({"d_state": 0}, "d_state"),
        ({"d_conv": 0}, "d_conv"),
        ({"d_state": 16.0}, "d_state must be an integer"),
        ({"expand": "2"}, "expand must be a number"),
        ({"expand": 1e-3}, "expand"),
        ({"dt_rank": "full"}, "dt_rank"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"dt_init": "zeros"}, "dt_init"),
        ({"dt_min": 0.1, "dt_max": 0.01}, "dt_min"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Mamba(8, **options)  # type: ignore[arg-type]


def test_a_state_of_another_shape_of_mamba() -> None:
    with pytest.raises(ArgumentError, match="state"):
        Mamba(8, d_state=4)(torch.randn(2, 3, 8), Mamba(8, d_state=8).initial_state(2))


def test_no_copies_of_the_halves_of_in_proj() -> None:
    seen: list[Tensor] = []
    scan = torch.ops.longscan.selective_scan.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is scan:
                seen.append(args[6])
            return function(*args, **(kwargs or {}))

    mixer, x = Mamba(8), torch.randn(2, 5, 8)
    with Watch():
        mixer._whole(x, None, None)
        mixer._parts(x, None, None)
    assert [z.stride() for z in seen] == 2 * [(5 * 32, 32, 1)]


def test_a_copy_keeps_its_marks() -> None:
    copied = copy.deepcopy(LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=5))).bfloat16()
    mixer = copied.backbone.blocks[0].mixer
    assert isinstance(mixer, Mamba)
    assert mixer.A_log.dtype == mixer.D.dtype == mixer.dt_proj.bias.dtype == torch.float32
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log._no_weight_decay


def test_an_ensemble_by_vmap_is_its_members() -> None:
    """Outputs and gradients, over stacked weights."""
    torch.manual_seed(0)
    members, x = [Mamba(8, d_state=4) for _ in range(3)], torch.randn(2, 5, 8)
    weights, buffers = torch.func.stack_module_state(members)

    def one(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        y, _ = torch.func.functional_call(members[0], (weights, buffers), (x,))
        return y

    together = torch.vmap(one)(weights, buffers)
    alone = torch.stack([member(x)[0] for member in members])
    torch.testing.assert_close(together, alone)
    found = torch.autograd.grad(together.square().sum(), list(weights.values()))
    expected = torch.autograd.grad(alone.square().sum(), [p for member in members for p in member.parameters()])
    for index, gradient in enumerate(found):
        torch.testing.assert_close(gradient, torch.stack(expected[index :: len(found)]))


def test_state_fields() -> None:
    state = Mamba(8, d_state=4).initial_state(3, dtype=torch.bfloat16)
    assert isinstance(state, MambaState)
    assert state.conv.shape == (3, 3, 16)
    assert state.conv.dtype == torch.bfloat16
    assert state.ssm.shape == (3, 16, 4)
    assert state.ssm.dtype == torch.float32

"""RWKV-4: both its mixings against Transformers' own, keys of any size, and the authors' initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import RWKV4, RWKV4Channels
from longscan.mixers.rwkv4 import weighted_average


def pair(d_model: int) -> tuple[RWKV4, torch.nn.Module]:
    """Ours and Transformers' time mixing with the same random weights."""
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    torch.manual_seed(0)
    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=d_model, num_hidden_layers=1, vocab_size=10), layer_id=0)
    ours = RWKV4(d_model)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        for name, parameter in theirs.named_parameters():
            ours.get_parameter(
                name.replace("time_mix_key", "time_mix_k")
                .replace("time_mix_value", "time_mix_v")
                .replace("time_mix_receptance", "time_mix_r")
            ).copy_(parameter.squeeze())
    return ours, theirs


def test_it_is_transformers() -> None:
    ours, theirs = pair(16)
    x = torch.randn(3, 37, 16)
    given, expected_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, _ = theirs(expected_x)
    y, _ = ours(given)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad, expected_x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.time_decay.grad, theirs.time_decay.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.time_first.grad, theirs.time_first.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_state_is_transformers() -> None:
    ours, theirs = pair(8)
    x = torch.randn(2, 11, 8)
    state = [torch.zeros(2, 8, 1) for _ in range(5)]
    state[4] -= 1e30
    theirs(x, state=state, use_cache=True)
    _, own = ours(x, ours.initial_state(2))
    torch.testing.assert_close(own.last, state[1][..., 0])
    torch.testing.assert_close(own.wkv, torch.stack([part[..., 0] for part in state[2:]], dim=1), rtol=1e-5, atol=1e-5)


def directly(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums as they are written, weights taken relative to the largest of each step."""
    outputs = []
    for t in range(k.shape[1]):
        past = torch.arange(t)
        exponents = torch.cat((k[:, :t] - (t - 1 - past)[:, None] * w, (u + k[:, t])[:, None]), dim=1)
        outputs.append((exponents.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("scale", [1.0, 300.0, 1e6])
def test_keys_of_any_size(scale: float) -> None:
    """e^1e6 and e^-1e6 side by side: outputs and gradients are those of a softmax in float64."""
    torch.manual_seed(0)
    w, u = torch.rand(5), torch.randn(5)
    k, v = (scale * torch.randn(2, 50, 5)).requires_grad_(), torch.randn(2, 50, 5).requires_grad_()
    before = torch.zeros(2, 3, 5)
    before[:, 2] = -1e38
    y, *_ = weighted_average(w, u, k, v, before)
    expected = directly(w.double(), u.double(), k.double(), v.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-5 * max(1.0, scale / 10))
    weights = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad((y * weights).sum(), (k, v)),
        torch.autograd.grad((expected * weights).sum(), (k, v)),
        strict=True,
    ):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, scale / 10))


def test_a_long_silence_is_remembered() -> None:
    """A key of e^60 fades below e^-60 keys only after its time: nothing underflows to 0 / 0 on the way."""
    k = torch.full((1, 4000, 1), -60.0)
    k[0, 0] = 60.0
    v = torch.ones(1, 4000, 1)
    v[0, 0] = 3.0
    before = torch.zeros(1, 3, 1)
    before[:, 2] = -1e38
    w, u = torch.tensor([0.1]), torch.tensor([0.0])
    y, *sums = weighted_average(w, u, k, v, before)
    expected = directly(w.double(), u.double(), k.double(), v.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(part.isfinite().all() for part in sums)


def test_a_decay_below_the_digits_of_a_key_still_fades() -> None:
    """w = 2e-7 beside a key of 20, whose last digit is 2e-6: what came first has lost e^-w to each later step."""
    k, v = torch.full((1, 20_000, 1), 20.0), torch.ones(1, 20_000, 1)
    k[0, 1:] = -100.0
    before = torch.zeros(1, 3, 1)
    before[:, 2] = -1e38
    _, numerator, _, peak = weighted_average(torch.tensor([2e-7]), torch.zeros(1), k, v, before)
    total = numerator[0, -1, 0].double().log() + peak[0, -1, 0].double()
    assert abs(float(total) - (20 - 2e-7 * 19_999)) < 1e-3


@torch.no_grad()
def test_a_million_steps() -> None:
    """Decays from none to speak of to e^-20 a step: an average of ones stays one, in float32, and the state finite."""
    length = 2**20
    w, k = torch.tensor([1e-9, 1e-3, 20.0]), 10 * torch.randn(1, length, 3, generator=torch.Generator().manual_seed(0))
    before = torch.zeros(1, 3, 3)
    before[:, 2] = -1e38
    y, *sums = weighted_average(w, torch.zeros(3), k, torch.ones_like(k), before)
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-5)
    assert all(part.isfinite().all() for part in sums)


def test_it_starts_as_the_authors_code() -> None:
    mixer = RWKV4(32, depth=0.0).to(torch.bfloat16)
    assert mixer.time_decay.dtype == torch.float32
    assert (mixer.time_decay[0], mixer.time_decay[-1]) == (-5, 3)
    torch.testing.assert_close(mixer.time_first.detach().exp()[:3], 0.3 * torch.tensor([0.0, 0.5, -0.5]).exp())
    for layer in (mixer.key, mixer.receptance, mixer.output):
        assert not layer.weight.any()
    value = RWKV4(32).value.weight
    torch.testing.assert_close(value @ value.T, torch.eye(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(RWKV4(4, depth=0.5).time_mix_r.detach(), (torch.arange(4) / 4) ** 0.25)
    torch.testing.assert_close(RWKV4(4, depth=0.5).time_mix_v.detach(), (torch.arange(4) / 4) ** 0.5 + 0.15)


def test_channel_mixing_is_transformers() -> None:
    from transformers import RwkvConfig
    from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward

    torch.manual_seed(0)
    theirs = RwkvFeedForward(RwkvConfig(hidden_size=8, intermediate_size=20, num_hidden_layers=1, vocab_size=10))
    ours = RWKV4Channels(8, d_hidden=20)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
            own = name.replace("time_mix_key", "time_mix_k").replace("time_mix_receptance", "time_mix_r")
            ours.get_parameter(own).copy_(parameter.squeeze())
    x = torch.randn(3, 11, 8, requires_grad=True)
    y, expected = ours(x)[0], theirs(x)[0]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(y)
    given = [x, ours.time_mix_k, ours.time_mix_r]
    for one, other in zip(
        torch.autograd.grad((y * weights).sum(), given),
        torch.autograd.grad((expected * weights).sum(), [x, theirs.time_mix_key, theirs.time_mix_receptance]),
        strict=True,
    ):
        torch.testing.assert_close(one, other.view_as(one), rtol=1e-4, atol=1e-5)


def test_channel_mixing_starts_as_the_authors_code() -> None:
    mixer = RWKV4Channels(8, depth=0.5)
    for mix in (mixer.time_mix_k, mixer.time_mix_r):
        torch.testing.assert_close(mix.detach(), (torch.arange(8) / 8) ** 0.5)
    for layer in (mixer.receptance, mixer.value):
        assert not layer.weight.any()
    key = mixer.key.weight.detach()
    torch.testing.assert_close(key.T @ key, 4 * torch.eye(8), rtol=0, atol=1e-5)
    assert not RWKV4Channels(8)(torch.randn(1, 3, 8))[0].any()


def test_options_that_make_no_sense() -> None:
    for mixer in (RWKV4, RWKV4Channels):
        with pytest.raises(ArgumentError, match="depth"):
            mixer(8, depth=1.5)
    with pytest.raises(ArgumentError, match="d_hidden"):
        RWKV4Channels(8, d_hidden=0)

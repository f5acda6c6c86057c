"""Parts of a sequence in several processes give what one process gives: outputs, gradients, and constant traffic."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from longscan.errors import ArgumentError
from longscan.mixers import make_mixer
from longscan.models import Classifier, ClassifierConfig, LanguageModel, LanguageModelConfig
from longscan.models.config import TRANSFORMER
from longscan.nn.recurrences import selective_scan
from longscan.nn.sequence_parallel import sequence_parallel
from longscan.training.parallel import Loss
from tests.distributed.processes import Groups, run
from tests.mixers.systems import D_MODEL, VARIANTS, make

Group = dist.ProcessGroup | None

DIVIDED = [name for name, (mixer, _) in VARIANTS.items() if mixer != "hyena"]
# Processes, and where packed sequences begin: on borders of parts and beside them, some empty, some over several parts.
CASES = ((2, [0, 2, 2, 8, 13, 17]), (3, None), (4, [0, 1, 17]))
# One variant of each mixer.
MIXERS = {mixer: name for name, (mixer, options) in VARIANTS.items() if name in DIVIDED and "block" not in options}

# Of these every operator of nn/recurrences.py.
ROUNDED = ("mamba", "mamba2", "s5", "linear-attention", "retnet")


def worker(groups: Groups) -> list[str]:
    found = []
    for size, offsets in CASES:
        if size in groups:
            found += [line for variant in DIVIDED for line in compare(variant, size, groups[size], offsets)]
    found += [line for variant in MIXERS.values() for line in traffic(variant, groups[4])] if 4 in groups else []
    found += [line for variant in ROUNDED for line in rounded(variant, groups[2])] if 2 in groups else []
    found += no_steps(groups[2]) if 2 in groups else []
    if 3 in groups:
        for fields in (
            {"mixer": "mamba"},
            {"mixer": "lstm"},
            {**TRANSFORMER, "positions": "learned", "max_positions": 18},
        ):
            found += language_model(fields, groups[3])
    return found


def compare(variant: str, size: int, group: Group, offsets: list[int] | None) -> list[str]:
    """Outputs and all gradients, in float64."""
    mixer = make(variant)
    length, batch = 17, 2 if offsets is None else 1
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, batch, length, D_MODEL, dtype=torch.float64, generator=generator).unbind()
    x.requires_grad_()
    whole, _ = mixer(x, cu_seqlens=cu_seqlens)
    expected = torch.autograd.grad((whole * weights).sum(), [x, *mixer.parameters()])
    with sequence_parallel(group, length=length) as part:
        y, _ = mixer(part.take(x), cu_seqlens=cu_seqlens)
        gradients = torch.autograd.grad((y * part.take(weights)).sum(), [x, *mixer.parameters()])
    gradients = [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    pairs = [("y", y, part.take(whole))]
    pairs += [(f"gradient of {name}", *pair) for name, *pair in zip(names, gradients, expected, strict=True)]
    return [
        f"{variant}, {part.rank} of {size}, {offsets}: {name} differs by {(mine - theirs).abs().max().item():.1e}"
        for name, mine, theirs in pairs
        if not torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)
    ]


def rounded(variant: str, group: Group) -> list[str]:
    """Under autocast, as close to one process as bfloat16 is."""
    mixer, generator = make(variant).float(), torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, D_MODEL, generator=generator).requires_grad_()
    sources = [x, *mixer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = mixer(x)
    expected = torch.autograd.grad(whole.float().square().sum(), sources)
    with sequence_parallel(group, length=16) as part:
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = mixer(part.take(x))
        gradients = [gradient.clone() for gradient in torch.autograd.grad(y.float().square().sum(), sources)]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    pairs = zip([y, *gradients], [part.take(whole), *expected], strict=True)
    far = [number for number, (mine, theirs) in enumerate(pairs) if (mine - theirs).norm() > 0.03 * theirs.norm()]
    return [f"{variant}, {part.rank}: differs under autocast in {far}"] if far else []


def no_steps(group: Group) -> list[str]:
    """Of the selective scan, where steps are 0 or nearly: the scan of gradients divides by them."""
    generator = torch.Generator().manual_seed(0)
    x, dt, B, C = (torch.randn(1, 12, 4, dtype=torch.float64, generator=generator) for _ in range(4))
    dt = torch.tensor([0.0, 1e-300, 1e-12, 0.5], dtype=torch.float64)[torch.arange(48).view(1, 12, 4) * 7 % 5 % 4]
    A = -torch.rand(4, 4, dtype=torch.float64, generator=generator)
    sources = [tensor.requires_grad_() for tensor in (x, dt, A, B, C)]
    expected = torch.autograd.grad(selective_scan(*sources).square().sum(), sources)
    with sequence_parallel(group, length=12) as part:
        own = [tensor if tensor is A else part.take(tensor) for tensor in sources]
        gradients = torch.autograd.grad(selective_scan(*own).square().sum(), sources)
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    pairs = enumerate(zip(gradients, expected, strict=True))
    far = [number for number, (mine, theirs) in pairs if not torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)]
    return [f"no steps, {part.rank}: gradients {far} differ"] if far else []


def traffic(variant: str, group: Group) -> list[str]:
    """Bytes are the same at three times the length; attention's are of every key and value."""
    mixer, counts = make(variant), []
    for length in (16, 48):
        x = torch.randn(1, length, D_MODEL, dtype=torch.float64).requires_grad_()
        with sequence_parallel(group, length=length) as part:
            mixer(part.take(x))[0].sum().backward()
        counts.append(part.traffic.bytes)
    found = []
    if variant == "mamba" and part.rank == 0:
        # The border of the convolution, and in three exchanges a state and a decay for each: float64.
        expected = 8 * mixer.d_inner * (3 + 3 * 2 * mixer.d_state)
        found = [] if counts[0] == expected else [f"{variant}: sent {counts[0]} bytes, expected {expected}"]
    if counts[1] != counts[0] * (3 if variant == MIXERS["attention"] else 1):
        found.append(f"{variant}, {part.rank}: {counts} bytes")
    return found


def language_model(fields: dict[str, Any], group: Group) -> list[str]:
    """float32, replicas that average gradients, recomputed layers."""
    torch.manual_seed(0)
    config = LanguageModelConfig(d_model=8, n_layer=2, vocab_size=32, d_intermediate=8, **fields)
    mixer = f"{config.mixer}, {config.norm} norms"
    whole, model = (LanguageModel(config) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    tokens = torch.randint(32, (2, 19), generator=torch.Generator().manual_seed(1))
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    expected = whole.loss(tokens, targets)
    expected.backward()
    for block in model.backbone.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    net = DistributedDataParallel(Loss(model), process_group=group)
    with sequence_parallel(group, length=18) as part:
        loss, _ = net(part.take(tokens), part.take(targets), None)
        loss.backward()
        loss = part.mean(loss)
        logits, _ = model(part.take(tokens))
    found = [] if torch.allclose(loss, expected, rtol=1e-6) else [f"{mixer}: loss {loss}, expected {expected}"]
    if not torch.allclose(logits, part.take(whole(tokens)[0]), rtol=1e-4, atol=1e-5):
        found.append(f"{mixer}: other logits")
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        if not torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=2e-6):
            found.append(f"{mixer}: the gradient of {name} differs by {(ours.grad - theirs.grad).abs().max():.1e}")
    return found


def test_parts_are_the_whole(tmp_path: Path) -> None:
    found = run(worker, tmp_path, (2, 3, 4))
    assert not found, "\n".join(found)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_cannot_be_cut_says_why(alone: None) -> None:
    x = torch.randn(1, 6, D_MODEL)
    refused = {
        "hyena": "a filter reaches over all of the past",
        "s4": "a bidirectional S4 reads the future too",
        "s5": "a bidirectional S5 reads the future too",
    }
    for name, reason in refused.items():
        options = {} if name == "hyena" else {"bidirectional": True}
        with (
            sequence_parallel(length=6),
            pytest.raises(ArgumentError, match=rf"takes whole sequences, not parts.*{reason}"),
        ):
            make_mixer(name, D_MODEL, **options)(x)
    block = make_mixer("hyena", D_MODEL, block="mamba")
    with sequence_parallel(length=6), pytest.raises(ArgumentError, match="all of the past"):
        block(x)
    classifier = Classifier(ClassifierConfig(d_model=D_MODEL, n_layer=1, vocab_size=4))
    with sequence_parallel(length=6), pytest.raises(ArgumentError, match="takes whole sequences"):
        classifier(torch.zeros(1, 6, dtype=torch.int64))


def test_arguments_that_do_not_fit(alone: None) -> None:
    mixer, x = make_mixer("mamba", D_MODEL), torch.randn(1, 6, D_MODEL)
    with sequence_parallel(length=6) as part:
        with pytest.raises(ArgumentError, match="has 5 tokens; process 0 of 1 has 6"):
            mixer(x[:, :5])
        with pytest.raises(ArgumentError, match="state: within sequence_parallel"):
            mixer(x, mixer.initial_state(1))
        with pytest.raises(ArgumentError, match="got length 5 along axis 1, expected 6"):
            part.take(x[:, :5])
        with pytest.raises(ArgumentError, match="cu_seqlens"):
            mixer(x, cu_seqlens=torch.tensor([0, 5]))
        model = LanguageModel(LanguageModelConfig(d_model=D_MODEL, n_layer=1, vocab_size=4))
        with pytest.raises(ArgumentError, match="last_only"):
            model(torch.zeros(1, 6, dtype=torch.int64), last_only=True)
    with sequence_parallel(length=2), pytest.raises(ArgumentError, match="shorter than the 3 that a convolution"):
        mixer(x[:, :2])
    with pytest.raises(ArgumentError, match="fewer tokens than the 1 processes"), sequence_parallel(length=0):
        pass


def test_segments_know_their_borders(alone: None) -> None:
    with sequence_parallel(length=10) as part:
        segments = part.segments(torch.zeros(1, 10, 1), torch.tensor([0, 3, 3, 8, 10]))
    assert segments.starts == (0, 3, 8)
    assert segments.cu_seqlens is not None
    assert segments.cu_seqlens.tolist() == [0, 3, 8, 10]
    assert (segments.rows, segments.last) == (3, 8)
    for first, end in itertools.combinations(range(11), 2):
        assert segments.broken(first, end) == any(first <= start < end for start in segments.starts)
    assert [segments.begin(place) for place in range(10)] == [0] * 3 + [3] * 5 + [8] * 2

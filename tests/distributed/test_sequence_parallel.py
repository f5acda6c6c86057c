"""Parts of a sequence in several processes give what one process gives: outputs, gradients, and constant traffic."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from longscan.nn.sequence_parallel import sequence_parallel
from tests.distributed.processes import Groups, run
from tests.mixers.systems import D_MODEL, VARIANTS, make

UNDIVIDED = {name for name, (mixer, _) in VARIANTS.items() if mixer == "hyena"}


def worker(groups: Groups) -> list[str]:
    found = []
    for variant in VARIANTS:
        if variant in UNDIVIDED:
            continue
        for size, group in groups.items():
            for offsets in (None, [0, 17], [0, 2, 2, 9, 13, 17], [0, 1, 17]):
                cu_seqlens = None if offsets is None else torch.tensor(offsets)
                found += compare(variant, size, group, cu_seqlens)
    return found


def compare(variant: str, size: int, group: dist.ProcessGroup | None, cu_seqlens: Tensor | None) -> list[str]:
    mixer = make(variant)
    length, batch = 17, 2 if cu_seqlens is None else 1
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, batch, length, D_MODEL, dtype=torch.float64, generator=generator).unbind()
    x.requires_grad_()
    whole, _ = mixer(x, cu_seqlens=cu_seqlens)
    expected = torch.autograd.grad((whole * weights).sum(), [x, *mixer.parameters()])
    own = x.detach().clone().requires_grad_()
    with sequence_parallel(group, length=length) as part:
        y, _ = mixer(part.take(own), cu_seqlens=cu_seqlens)
        gradients = torch.autograd.grad((y * part.take(weights)).sum(), [own, *mixer.parameters()])
    gradients = [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    pairs = [("y", y, part.take(whole))]
    pairs += [(f"gradient of {name}", *pair) for name, *pair in zip(names, gradients, expected, strict=True)]
    where = f"{variant}, {part.rank} of {size}, {None if cu_seqlens is None else cu_seqlens.tolist()}"
    return [
        f"{where}: {name} differs by {(mine - theirs).abs().max().item():.1e}"
        for name, mine, theirs in pairs
        if not torch.allclose(mine, theirs, rtol=1e-9, atol=1e-10)
    ]


def test_every_mixer_in_parts(tmp_path: Path) -> None:
    found = run(worker, tmp_path, (2, 3, 4))
    assert not found, "\n".join(found)

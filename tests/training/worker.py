"""What each process of torchrun does in the tests of several: `-m tests.training.worker FOLDER DEVICE PART...`."""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from longscan.errors import LongscanError
from longscan.training import Ranks, TrainConfig, gather, join
from tests.training.helpers import Silent, make_trainer

# 12 rows can be shared by 1, 2 and 3 processes of 2 micro-batches each.
BASE = TrainConfig(steps=8, batch_size=12, sequence_length=16, accumulate=2, evaluations=2, clip=0.5)
# A checkpoint is written during every step, and all are kept.
SAVED: dict[str, Any] = {"checkpoint_minutes": 1e-9, "keep_checkpoints": 9}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "recomputed": {"parallel": "fsdp", "recompute": True, "carry_state": True},
    "compiled": {"parallel": "fsdp", "recompute": True, "compile_blocks": True},
    "replicas": {"parallel": "fsdp", "replicas": 2},
    "bfloat16": {"parallel": "fsdp", "precision": "bfloat16"},
    "gathered-bfloat16": {"parallel": "fsdp", "precision": "bfloat16", "gather_precision": "bfloat16"},
    # Both processes have a half of every sequence.
    "parts": {"parallel": "fsdp", "sequence_parallel": 2, "recompute": True, "compile_blocks": True},
    "muon": {"parallel": "fsdp", "optimizer": "muon"},
    # Both processes have a half of every layer's channels.
    "channels": {"tensor_parallel": 2, "recompute": True} | SAVED,
    "channels-muon": {"tensor_parallel": 2, "optimizer": "muon"},
    "saved": {"parallel": "fsdp", "carry_state": True} | SAVED,
}
# Four processes, two by two.
GRIDS: dict[str, dict[str, Any]] = {
    "replicas-shards": {"parallel": "fsdp", "replicas": 2} | SAVED,
    "shards-channels": {"parallel": "fsdp", "tensor_parallel": 2} | SAVED,
    "replicas-channels": {"tensor_parallel": 2},
    "parts-channels": {"sequence_parallel": 2, "tensor_parallel": 2},
}
AGAIN = ("replicas-shards", "shards-channels")
ALONE = dataclasses.replace(BASE, accumulate=1, **SAVED)


def config_of(name: str) -> TrainConfig:
    own = CASES[name] if name in CASES else {"accumulate": 1} | GRIDS[name]
    return dataclasses.replace(BASE, **own)


def case(name: str, root: Path, ranks: Ranks, device: torch.device) -> None:
    """A case to its end."""
    trainer, model = make_trainer(root / name, config_of(name), ranks=ranks, device=device)
    assert trainer.run()
    whole = gather(model, ranks)
    if whole is not None and ranks.first:
        whole.save_pretrained(root / name / "model")


def grids(root: Path, ranks: Ranks, device: torch.device) -> None:
    """How four processes can share a model; what each then has of a layer's matrix."""
    for name in GRIDS:
        trainer, model = make_trainer(root / name, config_of(name), ranks=ranks, device=device)
        matrix = model.backbone.blocks[0].mixer.in_proj.weight
        share = 4 if name == "shards-channels" else 2
        assert matrix.to_local().numel() * share == matrix.numel()
        assert trainer.run()
    for name in AGAIN:
        assert make_trainer(root / f"{name}-again", config_of(name), ranks=ranks, device=device)[0].run()


def full_disk(root: Path, ranks: Ranks, device: torch.device) -> None:
    """The second process cannot write its second shard: what each is told, and which checkpoints are left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == 2 and ranks.rank == 1:
            trainer._checkpoints.finish()  # the first is whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return False

    trainer, _ = make_trainer(root / "full", config_of("saved"), ranks=ranks, device=device, stop=stop)
    said = ""
    try:
        trainer.run()
    except LongscanError as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (root / f"full-{ranks.rank}.json").write_text(json.dumps(said))


def go_on(root: Path, ranks: Ranks, device: torch.device) -> None:
    """To the end from what other numbers of processes have left."""
    for name in ("damaged", "one"):
        observer = Silent()
        trainer, _ = make_trainer(root / name, config_of("saved"), ranks=ranks, device=device, observer=observer)
        assert trainer.run()
        (root / f"{name}-{ranks.rank}.json").write_text(json.dumps(observer.warnings))


PARTS = {name: functools.partial(case, name) for name in CASES}
PARTS |= {"grids": grids, "full_disk": full_disk, "go_on": go_on}


def main(folder: str, device: str, *parts: str) -> None:
    # The compiler is not what is tested, and takes its time.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
    with join(device) as (ranks, own):
        for part in parts:
            PARTS[part](Path(folder), ranks, own)
        ranks.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A tiny run, shared by the tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longscan.models import LanguageModel, LanguageModelConfig
from longscan.training import Batches, Ranks, Stepper, TrainConfig, Trainer

SHAPE = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=32, mixer_options={"d_state": 4})
TOKENS = (np.arange(5000) ** 2 // 7 % 32).astype(np.uint8)
CONFIG = TrainConfig(steps=12, batch_size=4, sequence_length=16, optimizer="muon", evaluations=3)


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.saves: list[int] = []

    def stepped(self, row: dict[str, Any]) -> None:
        pass

    def saved(self, step: int, path: Path) -> None:
        self.saves.append(step)

    def warned(self, message: str) -> None:
        self.warnings.append(message)


def make_trainer(
    folder: Path,
    config: TrainConfig = CONFIG,
    *,
    stop: Callable[[], bool] = lambda: False,
    shape: LanguageModelConfig = SHAPE,
    observer: Silent | None = None,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
) -> tuple[Trainer, LanguageModel]:
    """A trainer of a fresh model in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = LanguageModel(shape).to(device)  # initialised on the CPU: the same weights on every device
    batches = Batches(TOKENS, config.batch_size, config.sequence_length, config.seed, config.carry_state)
    ranks, device = ranks or Ranks(), device or torch.device("cpu")
    stepper = Stepper(model, config, batches, ranks=ranks, device=device)
    trainer = Trainer(
        folder,
        config,
        stepper,
        ranks=ranks,
        device=device,
        bits_per_byte=1.0,
        observer=observer or Silent(),
        estimate=lambda: held_out(model),
        should_stop=stop,
    )
    return trainer, model


def held_out(model: LanguageModel) -> float:
    tokens = torch.from_numpy(TOKENS[:65].astype(np.int64))[None].to(model.device)
    with torch.no_grad():
        return float(model.loss(tokens[:, :-1], tokens[:, 1:]))


def history(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without the times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

"""Training and generation without end: the memory of the process stays what it was."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longscan.models import LanguageModel, LanguageModelConfig
from longscan.training import TrainConfig
from tests.soak import folder, record
from tests.training.helpers import history, make_trainer

SHAPE = LanguageModelConfig(d_model=64, n_layer=2, vocab_size=32, d_intermediate=96)
ENDLESS = TrainConfig(
    steps=10**9, batch_size=4, sequence_length=128, accumulate=2, carry_state=True, optimizer="muon",
    schedule="constant", warmup=0.0, learning_rate=1e-3, leave_out_bad_steps=True, recompute=True, evaluations=0,
    checkpoint_minutes=0.05,
)  # fmt: skip


class Watch:
    """Resident memory over some time: called again and again, it says whether the time is over."""

    def __init__(self, seconds: float, samples: int = 200) -> None:
        self._begin, self._seconds, self._every = time.monotonic(), seconds, seconds / samples
        #: Seconds since the beginning, and bytes.
        self.samples: list[tuple[float, int]] = []

    def __call__(self) -> bool:
        elapsed = time.monotonic() - self._begin
        if elapsed >= len(self.samples) * self._every:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append((round(elapsed, 1), pages * os.sysconf("SC_PAGE_SIZE")))
        return elapsed >= self._seconds

    def growth(self) -> float:
        """Bytes between the medians of the second quarter and of the last; the first warms up."""
        sizes = [size for _, size in self.samples]
        quarter = len(sizes) // 4
        return statistics.median(sizes[-quarter:]) - statistics.median(sizes[quarter : 2 * quarter])


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    """Half of the time a run with checkpoints, half of it streams and batches of prompts of many lengths."""
    seconds = 30 * float(os.environ.get("LONGSCAN_MINUTES", "30"))
    watch = Watch(seconds)
    trainer, model = make_trainer(tmp_path, ENDLESS, stop=watch, shape=SHAPE)
    assert not trainer.run()
    steps = history(tmp_path)[-1]["step"]
    watches = {"training": watch, "generation": Watch(seconds)}
    tokens = generate_until(watches["generation"], model)
    found: dict[str, Any] = {"steps": steps, "tokens_a_step": 512, "tokens_generated": tokens}
    for name, each in watches.items():
        found[name] = {"grown_bytes": each.growth(), "seconds_and_bytes": each.samples}
    record("memory", found)
    place = folder()
    if place is not None:
        draw(watches, place / "memory.png")
    for name, each in watches.items():
        assert each.growth() < 0.01 * each.samples[0][1], name


def generate_until(over: Watch, model: LanguageModel) -> int:
    """A stream that goes on from its state, and prompts between its pieces; how many tokens were generated."""
    drawn, made = random.Random(0), 0
    last, state = [0], None
    while not over():
        stream = model.generate([last], 100, state=state, seed=made, temperature=0.8, top_p=0.95)
        last, state = stream.pending[0], stream.state
        prompts = [[drawn.randrange(32) for _ in range(drawn.randrange(1, 1000))] for _ in range(drawn.randrange(1, 5))]
        batch = model.generate(prompts, 50, seed=made, repetition_penalty=1.1)
        made += 100 + sum(map(len, batch.tokens))
        for _ in zip(range(100), model.stream(last, None, seed=made), strict=False):  # left before its end
            made += 1
    return made


def draw(watches: dict[str, Watch], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panel = figure.subplots()
    for name, watch in watches.items():
        panel.plot([each[0] / 60 for each in watch.samples], [each[1] / 1e6 for each in watch.samples], label=name)
    panel.set_ylim(0, 1.2 * max(each[1] for watch in watches.values() for each in watch.samples) / 1e6)
    panel.set_xlabel("minutes")
    panel.set_ylabel("resident memory, MB")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=110)

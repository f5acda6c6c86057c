"""What a model of waveforms makes, to listen to."""

from __future__ import annotations

from pathlib import Path

import torch

from longscan.models import Sashimi
from longscan.tasks.audio import Waveforms, from_mu_law, write_wav
from longscan.tasks.watching import tell

# Samples are made one by one, at some milliseconds each: a quarter of a second of sound takes about half a minute.
_SECONDS = 0.25


@torch.no_grad()
def continue_waveform(model: Sashimi, task: Waveforms, path: Path, seed: int = 0) -> Path:
    """Write a WAV file: the first half of a sequence that no training saw, and how the model goes on, as long again or
    for a quarter of a second.

    Args:
        model: of the task; whether it trains is as before afterwards.
        task: whose test sequences it goes on from.
        path: of the file.
        seed: of the sequence and of the samples drawn.

    Raises:
        DataError: SciPy is not installed.
        StorageError: the disk refused.
    """
    device, trains = next(model.parameters()).device, model.training
    inputs, _ = next(iter(task.tests(task.length, 1, 1, device, seed)))
    prompt = inputs[:1, : max(1, task.length // 2)]
    model.eval()
    length = min(prompt.shape[1], max(1, round(_SECONDS * task.rate)))
    made = model.generate(prompt, length, seed=seed, begun=lambda done: tell("going on, in sound", done, length))
    model.train(trains)
    return write_wav(path, from_mu_law(torch.cat([prompt, made], dim=1)[0].cpu()), task.rate)

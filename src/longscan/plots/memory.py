"""What a Mamba trained on induction heads remembers of one marker in endless noise, drawn."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from longscan.evaluation.memory import memory_lengths, state_norms
from longscan.models import LanguageModel
from longscan.nn.storage import write_atomically
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.task import uniform

_SEQUENCES = 4
# States are looked at up to so many times the length that was trained at.
_LONGEST = 256
# What has faded after more tokens is drawn here.
_FOREVER = 1e15


def plot_memory(model: LanguageModel, task: InductionHeads, path: Path, *, seed: int = 0) -> Path:
    """A column per layer: how many tokens of noise each channel remembers, sorted; and below it the size of each
    channel's state as the noise goes on after a marker, over its size at the length that was trained at.

    Args:
        model: of Mamba layers, trained on ``task``.
        task: its length is the one trained at.
        path: a PNG file.
        seed: of the input.

    Raises:
        StorageError: the figure could not be written.
    """
    from matplotlib.figure import Figure

    trained = task.length
    lengths = [trained]
    while lengths[-1] < _LONGEST * trained:
        lengths.append(2 * lengths[-1])
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = uniform(0, task.vocab - 1, (_SEQUENCES, lengths[-1]), generator)
    noise = memory_lengths(model, tokens[:, : 16 * trained])
    memories = [memory.clamp(max=_FOREVER).cpu().numpy() for memory in noise]
    tokens[:, trained // 8] = task.vocab - 1
    norms = [norm.cpu().numpy() for norm in state_norms(model, tokens, lengths)]
    figure = Figure(figsize=(5 * len(memories), 7), layout="constrained")
    panels = figure.subplots(2, len(memories), sharey="row", squeeze=False)
    for layer, (memory, norm) in enumerate(zip(memories, norms, strict=True)):
        upper, lower = panels[:, layer]
        upper.semilogy(sorted(memory, reverse=True), color="#1f6fb4")
        upper.axhline(trained, color="0.4", linestyle="--", linewidth=1)
        upper.text(len(memory) - 1, trained * 1.3, f"trained at {trained:,}", ha="right", fontsize=8, color="0.3")
        upper.set_title(f"layer {layer + 1}", loc="left", fontsize=9)
        upper.set_xlabel("channels, sorted")
        lower.loglog(lengths, norm / norm[0].clip(min=1e-30), color="#c2405a", alpha=0.25, linewidth=0.8)
        lower.set_xlabel("tokens read, noise but for one marker")
    panels[0, 0].set_ylabel("tokens of noise until a state has faded to 1/e")
    panels[1, 0].set_ylabel(f"size of a channel's state, after {trained:,} tokens: 1")
    return write_atomically(path, functools.partial(figure.savefig, format="png", dpi=120))

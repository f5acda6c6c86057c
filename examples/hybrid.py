"""Mamba and attention in one model, compared on recall: what followed this key the last time?"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from longscan import LanguageModel, LanguageModelConfig

KEYS = VALUES = 12


def recall(batch: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Pairs of a key and its value, each key once, then all keys again; values there are the targets."""
    keys = torch.stack([torch.randperm(KEYS)[:pairs] for _ in range(batch)])
    values = KEYS + torch.randint(VALUES, (batch, pairs))
    order = torch.stack([torch.randperm(pairs) for _ in range(batch)])
    shown, asked = torch.stack([keys, values], -1), torch.stack([keys.gather(1, order), values.gather(1, order)], -1)
    tokens = torch.cat([shown, asked], dim=1).flatten(1)
    targets = torch.full_like(tokens, -100)
    targets[:, 2 * pairs :: 2] = tokens[:, 2 * pairs + 1 :: 2]
    return tokens, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    # One name per layer.
    mixers = {"Mamba": ("mamba", "mamba"), "hybrid": ("mamba", "attention")}
    for name, layers in mixers.items():
        torch.manual_seed(0)
        config = LanguageModelConfig(
            d_model=64, n_layer=2, vocab_size=KEYS + VALUES, mixer=layers, mixer_options={layers[1]: {}}
        )
        model = LanguageModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(options.steps):
            loss = model.loss(*recall(32, options.pairs))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tokens, targets = recall(256, options.pairs)
        counts = targets != -100
        right = (model(tokens)[0].argmax(-1) == targets)[counts].float().mean()
        sizes = ", ".join(f"{model.state_bytes(1, length):,} after {length:,} tokens" for length in (100, 10_000))
        print(f"{name}: {100 * right:.0f} % recalled after {options.steps} steps; bytes of state: {sizes}")


if __name__ == "__main__":
    main()

"""A Mamba layer inside a network of one's own: which of two tones is hidden in a noisy signal?"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from longscan import Mamba


class Listener(nn.Module):
    """Samples (batch, length) to scores of two classes: a strided convolution, a Mamba, the mean over time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.front = nn.Conv1d(1, width, kernel_size=8, stride=4)
        self.norm = nn.RMSNorm(width)
        self.mamba = Mamba(width)
        self.head = nn.Linear(width, 2)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.front(signal[:, None]).transpose(1, 2)  # (batch, time, width), the layout of every mixer
        y, _ = self.mamba(self.norm(x))  # no state given: none comes back
        return self.head((x + y).mean(dim=1))


def signals(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Tones of 0.030 or 0.045 periods a sample, at any phase, under noise several times as strong."""
    labels = torch.randint(2, (batch,))
    pitch = 0.030 + 0.015 * labels[:, None]
    tone = torch.sin(2 * math.pi * (pitch * torch.arange(length) + torch.rand(batch, 1)))
    return tone + 2 * torch.randn(batch, length), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Listener(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        signal, labels = signals(32, options.length)
        loss = nn.functional.cross_entropy(model(signal), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == options.steps:
            right = (model(signal).argmax(1) == labels).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, {100 * right:.0f} % right")


if __name__ == "__main__":
    main()

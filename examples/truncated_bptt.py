"""Training on an endless stream, chunk by chunk: the state goes on, gradients end at the border (truncated BPTT).

The task is a leaky average that remembers longer than a chunk.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from longscan import Mamba, State

KEEP = 0.98  # a step back counts this much; half of it is gone after 34


class Averager(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.mamba, self.outer = nn.Linear(1, width), Mamba(width), nn.Linear(width, 1)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.mamba(self.inner(x), state)
        return self.outer(y), state


def next_chunk(average: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (batch, length, 1) after an average (batch, 1)."""
    x, targets = torch.randn(len(average), length, 1), []
    for value in x.unbind(dim=1):
        average = KEEP * average + (1 - KEEP**2) ** 0.5 * value
        targets.append(average)
    return x, torch.stack(targets, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=600)
    options = parser.parse_args()
    for carried in (False, True):
        torch.manual_seed(0)
        model, average = Averager(32), torch.zeros(16, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        state, losses = model.mamba.initial_state(16), []
        for _ in range(options.chunks):
            x, targets = next_chunk(average, length=16)
            y, after = model(x, state)
            loss = nn.functional.mse_loss(y, targets)
            loss.backward()  # frees the chunk: memory does not grow with the stream
            optimizer.step()
            optimizer.zero_grad()
            average, state = targets[:, -1], after.detach() if carried else state
            losses.append(loss.item())
        print(f"state {'carried' if carried else 'reset'}: square error {torch.tensor(losses[-50:]).mean():.3f}")


if __name__ == "__main__":
    main()

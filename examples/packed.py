"""Sequences of many lengths in one row: no padding to pay for, no leak across borders."""

from __future__ import annotations

import argparse
import time

import torch

from longscan import LanguageModel, LanguageModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--longest", type=int, default=1000)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=64, n_layer=2, vocab_size=256)).eval()
    # Many short ones and a few long ones, as in real text.
    lengths = (options.longest * torch.rand(options.sequences) ** 4).long() + 2
    sequences = [torch.randint(256, (int(length),)) for length in lengths]

    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    row = torch.cat(sequences)[None]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # where each begins, and the end of the last

    with torch.no_grad():
        model(row, cu_seqlens=offsets), model(padded)  # compiles the kernels
        start = time.perf_counter()
        together, _ = model(row, cu_seqlens=offsets)
        middle = time.perf_counter()
        model(padded)
        end = time.perf_counter()
        alone, _ = model(sequences[-1][None])
    print(f"packed: {row.numel():,} tokens, {1000 * (middle - start):.1f} ms")
    print(f"padded: {padded.numel():,} tokens, {1000 * (end - middle):.1f} ms")
    print(f"the last sequence alone and in the row differ by {(together[:, offsets[-2] :] - alone).abs().max():.1e}")

    # Training is the same call; targets that would cross a border do not count.
    targets = torch.roll(row, -1, dims=1)
    targets[0, offsets[1:] - 1] = -100
    loss = model.loss(row, targets, cu_seqlens=offsets)
    loss.backward()
    print(f"loss of all {options.sequences} sequences: {loss.item():.3f} nats a token")

    # A state per sequence comes back: go on with any of them.
    _, states = model(row, model.initial_state(options.sequences), cu_seqlens=offsets)
    print(
        f"states of {states.batch} sequences, {states.nbytes:,} bytes; the third alone: {states.select([2]).nbytes:,}"
    )


if __name__ == "__main__":
    main()

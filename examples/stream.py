"""A million tokens through a model at constant memory: the state is all that is kept of them."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from longscan import LanguageModel, LanguageModelConfig


def peak_memory() -> str:
    """The most memory that this process has had."""
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of what the system counts in
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=4096, help="tokens taken at once")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=128, n_layer=4, vocab_size=256)).eval()
    state = model.initial_state(batch=1)
    print(f"the state: {state.nbytes:,} bytes; attention of this size would keep 4,096 bytes of each token")

    done, nats, start = 0, 0.0, time.perf_counter()
    report = max(options.chunk, options.tokens // 8)
    with torch.no_grad():
        while done < options.tokens:
            # Any source will do: a file, a socket, a sensor. It is read once and not kept.
            chunk = torch.randint(256, (1, min(options.chunk, options.tokens - done)))
            logits, state = model(chunk, state)
            nats += torch.nn.functional.cross_entropy(logits[0, :-1], chunk[0, 1:], reduction="sum").item()
            done += chunk.shape[1]
            if done % report < options.chunk or done == options.tokens:
                speed = done / (time.perf_counter() - start)
                print(
                    f"{done:>9,} tokens: state {state.nbytes:,} bytes, process at most {peak_memory()}, "
                    f"{speed:,.0f} tokens/s, {nats / done:.2f} nats a token"
                )


if __name__ == "__main__":
    main()

"""Fine-tuning with LoRA (peft): a model of one text learns another by small additions to its projections."""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, inject_adapter_in_model

from longscan import LanguageModel, LanguageModelConfig

FIRST = b"the quick brown fox jumps over the lazy dog. " * 8
SECOND = b"pack my box with five dozen liquor jugs, now! " * 8


def train(model: LanguageModel, text: bytes, steps: int) -> None:
    tokens = torch.tensor(list(text))[None]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(steps):
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: LanguageModel, text: bytes) -> float:
    tokens = torch.tensor(list(text))[None]
    return model.loss(tokens[:, :-1], tokens[:, 1:]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=64, n_layer=2, vocab_size=256))
    train(model, FIRST, options.steps)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print(f"trained: {loss(model, FIRST):.3f} nats a byte; of the other text {loss(model, SECOND):.3f}")

    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    adapter = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets)
    model = inject_adapter_in_model(adapter, model)
    few = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"LoRA trains {few:,} of {model.num_parameters():,} parameters")
    train(model, SECOND, options.steps)
    kept = model.state_dict()
    same = all(
        torch.equal(kept.get(k, kept.get(k.replace("_proj.", "_proj.base_layer."))), v) for k, v in before.items()
    )
    print(f"fine-tuned: of the other text {loss(model, SECOND):.3f}; the first weights are untouched: {same}")


if __name__ == "__main__":
    main()

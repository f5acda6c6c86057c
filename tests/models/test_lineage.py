"""Every mixer in a language model: it learns, and generates what a whole pass would."""

from __future__ import annotations

import pytest
import torch

from longscan.mixers import MIXERS
from longscan.models import LanguageModel, LanguageModelConfig

TEXT = torch.tensor(list(b"abcabcabdabcabcabd" * 4))[None] - 97


@pytest.mark.parametrize("mixer", MIXERS)
def test_it_learns_and_generates(mixer: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(d_model=32, n_layer=2, vocab_size=4, mixer=mixer, d_intermediate=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(TEXT[:, :-1], TEXT[:, 1:])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The last two letters name the next one, save that every third "ab" ends in d.
    assert losses[-1] < 0.4 * losses[0]
    prompt = TEXT[0, :20].tolist()
    with torch.no_grad():
        tokens = list(prompt)
        for _ in range(6):
            logits, _ = model(torch.tensor([tokens]))
            tokens.append(int(logits[0, -1].argmax()))
    assert model.generate(prompt, 6, temperature=0).tokens[0][-6:] == tokens[-6:]

"""States that go from one batch to the next: a model trained on short sequences meets the states of long ones.

After a few hundred steps a recurrent state is still close to where it began. Channels that forget slowly are then never
seen as they are in a long sequence, and what a model does with them there is left to chance. Starting from the states
that the last batch ended with makes them part of what is trained, at no cost: Buitrago Ruiz and Gu 2025 (arXiv
2507.02782), who call it state passing. Gradients stay within a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ConfigError
from longscan.models import LanguageModel


class CarriedStates:
    """The states of a batch's rows, kept in place, so that a captured step finds them again.

    Rows begin anew at random, the first one always and each later one less often, the last about once in ``steps``:
    states of all ages are trained, the empty one with them.

    Args:
        model: whose states they are.
        batch: number of rows.
        steps: of the whole training.
        generator: decides which rows begin anew.

    Raises:
        ConfigError: the model's memory grows with the sequence, as attention's does.
    """

    def __init__(self, model: LanguageModel, batch: int, steps: int, generator: torch.Generator) -> None:
        if model.state_bytes(1, 2) != model.state_bytes(1, 1):
            raise ConfigError("carry_state: the memory of one of the mixers grows with all it has read; leave it off")
        self._model = model
        self.generator = generator
        self._empty, self._state = model.initial_state(batch), model.initial_state(batch)
        ages = torch.arange(batch, device=generator.device) / max(1, batch - 1)
        self._anew = float(steps) ** -ages

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return self._state.tensors()

    def begin_anew(self) -> None:
        """Forget everything."""
        for kept, empty in zip(self.tensors, self._empty.tensors(), strict=True):
            kept.copy_(empty)

    def read(self, tokens: Tensor) -> Tensor:
        """Final hidden vectors (batch, places, d_model) of tokens (batch, places), which follow those read before."""
        draws = torch.rand(self._anew.shape, generator=self.generator, device=self._anew.device)
        anew = draws < self._anew
        empty = iter(self._empty.tensors())
        before = self._state.map(lambda kept: torch.where(anew.view(-1, *[1] * (kept.dim() - 1)), next(empty), kept))
        hidden, after = self._model.backbone(tokens, before)
        assert after is not None
        for kept, new in zip(self.tensors, after.tensors(), strict=True):
            kept.copy_(new.detach())
        return hidden

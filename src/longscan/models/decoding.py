"""The fastest way from one token to the next that a model has here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longscan.errors import BackendError
from longscan.mixers.mamba import Mamba, MambaState
from longscan.nn.state import ModelState

if TYPE_CHECKING:
    from longscan.models.backbone import Block
    from longscan.models.language_model import LanguageModel
    from longscan.ops.mamba_step import MambaStepWeights


class Stepper(Protocol):
    """Takes one token per row; owns the state it is given and may update it in place."""

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """tokens (batch,) to logits (batch, vocab_size) and the next state."""


def make_stepper(model: LanguageModel) -> Stepper:
    """One compiled call per token where the model is all Mamba on the CPU, else module by module.

    The weights are read when it is made: make a new one after they have changed.
    """
    if model.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        try:
            return CompiledStepper(model)
        except BackendError:
            pass
    return ModuleStepper(model)


class ModuleStepper:
    """Steps the modules one by one."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        return self._model.step(tokens, state, inplace=True)


class CompiledStepper:
    """All layers and the head of a real Mamba in one call (:mod:`longscan.ops.mamba_step`).

    Raises:
        BackendError: the model has other mixers, or weights that the compiled step cannot read.
    """

    def __init__(self, model: LanguageModel) -> None:
        from longscan.ops.mamba_step import MambaDecoder

        layers = [_weights(block) for block in model.backbone.blocks]
        self._decoder = MambaDecoder(
            layers,
            embedding=model.backbone.embedding.weight,
            final_norm=model.backbone.norm_f.weight,
            eps=model.backbone.norm_f.eps,
            head=None if model.config.tie_embeddings else model.lm_head.weight,
        )
        self._vocab_size = model.config.vocab_size

    def step(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        states = [(own.conv, own.ssm) for own in state.layers if isinstance(own, MambaState)]
        return self._decoder.step(tokens, states)[:, : self._vocab_size], state


def _weights(block: Block) -> MambaStepWeights:
    from longscan.ops.mamba_step import MambaStepWeights

    mixer = block.mixer
    if not isinstance(mixer, Mamba) or mixer.is_complex or mixer.selection_norm_eps is not None:
        raise BackendError(f"the compiled step serves Mamba with a real A and no inner norms, this layer is {mixer}")
    if block.mlp is not None:
        raise BackendError("the compiled step serves blocks without an MLP")
    return MambaStepWeights(
        norm=block.norm.weight,
        eps=block.norm.eps,
        in_proj=mixer.in_proj.weight,
        in_proj_bias=mixer.in_proj.bias,
        conv=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        x_proj=mixer.x_proj.weight,
        dt_proj=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias,
        A=mixer.A,
        D=mixer.D,
        out_proj=mixer.out_proj.weight,
        out_proj_bias=mixer.out_proj.bias,
    )

"""The residual backbone: an embedding, blocks of any mixers, a final norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.models.config import LanguageModelConfig
from longscan.nn.mixer import SequenceMixer, check_batch, check_state
from longscan.nn.mlp import MLP, GatedMLP, make_mlp
from longscan.nn.norms import ADD_NORMS, AddLayerNorm, AddRMSNorm
from longscan.nn.positions import make_positions, places
from longscan.nn.state import ModelState, State


class Block(nn.Module):
    """Add, norm, mixer and, if wanted, add, norm, MLP.

    The sum of a branch with the residual stream waits for the next norm, with which it is fused: a block takes and
    gives the last branch's output and the stream before it. In post-norm, a block's first norm is that of the sum with
    the block before, which the first one lacks, and what is normed is the stream.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        layer: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.prenorm = config.residual_in_fp32, config.prenorm
        make_norm = partial(ADD_NORMS[config.norm], config.d_model, config.norm_eps, device=device, dtype=dtype)
        self.norm: AddRMSNorm | AddLayerNorm | None = make_norm() if config.prenorm or layer else None
        self.mixer: SequenceMixer = config.build_mixer(layer, config.d_model, device=device, dtype=dtype)
        self.norm2: AddRMSNorm | AddLayerNorm | None = None
        self.mlp: GatedMLP | MLP | None = None
        if config.d_intermediate:
            self.norm2 = make_norm()
            self.mlp = make_mlp(config.mlp, config.d_model, config.d_intermediate, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, State | None]:
        """x, residual (batch, length, d_model) to the same two, and the mixer's state."""
        x, residual = self._normed(self.norm, x, residual)
        x, state = self.mixer(x, state, cu_seqlens=cu_seqlens)
        return *self._feed_forward(x, residual), state

    def step(
        self, x: Tensor, residual: Tensor | None, state: State, *, inplace: bool = False
    ) -> tuple[Tensor, Tensor, State]:
        """:meth:`forward` for one token: x, residual (batch, d_model)."""
        x, residual = self._normed(self.norm, x, residual)
        x, state = self.mixer.step(x, state, inplace=inplace)
        return *self._feed_forward(x, residual), state

    def _feed_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.mlp is None:
            return x, residual
        x, residual = self._normed(self.norm2, x, residual)
        return self.mlp(x), residual

    def _normed(
        self, norm: AddRMSNorm | AddLayerNorm | None, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the next branch reads, and the stream beside it."""
        total = x
        if norm is not None:
            dtype = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else x.dtype
            x, total = norm(x, residual, dtype)
        return x, total if self.prenorm else x


class Backbone(nn.Module):
    """Tokens to final hidden vectors, (batch, length) to (batch, length, d_model)."""

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, device=device, dtype=dtype)
        self.positions = make_positions(
            config.positions,
            config.d_model,
            config.max_positions,
            scale=math.sqrt(config.d_model),
            device=device,
            dtype=dtype,
        )
        self.layers = nn.ModuleList(Block(config, layer, device=device, dtype=dtype) for layer in range(config.n_layer))
        self.norm_f = ADD_NORMS[config.norm](config.d_model, config.norm_eps, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return cast("list[Block]", list(self.layers))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as the released Mamba models do.

        Embedding N(0, 0.02^2), biases zero, and every projection back to the residual stream divided by the root of the
        number of branches, so that the stream's variance does not grow with depth (as in GPT-2).
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        branches = self.config.n_layer * (2 if self.config.d_intermediate else 1)
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                # Of a mixer inside a block, the output goes through the block's own projection.
                if name.endswith(("out_proj.weight", "fc2.weight")) and ".inner." not in name:
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                    parameter.div_(math.sqrt(branches))
            for module in layer.modules():
                if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
                    nn.init.zeros_(module.bias)

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can capture every mixer."""
        return all(block.mixer.capturable for block in self.blocks)

    def initial_state(self, batch: int, dtype: torch.dtype | None = None) -> ModelState:
        """The state before the first token."""
        check_batch(batch)
        positions = None
        if self.positions is not None:
            positions = torch.zeros(batch, device=self.norm_f.weight.device, dtype=torch.int64)
        return ModelState(tuple(block.mixer.initial_state(batch, dtype=dtype) for block in self.blocks), positions)

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of ``batch`` sequences after ``length`` tokens."""
        own = 0 if self.positions is None else 8 * batch
        return own + sum(block.mixer.state_bytes(batch, length) for block in self.blocks)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """tokens (batch, length) to normalised hidden vectors (batch, length, d_model), and the state after them."""
        if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
            raise ArgumentError(f"tokens must be (batch, length), both at least 1; got shape {tuple(tokens.shape)}")
        self.check_tokens(tokens)
        return self.mix(self.embedding(tokens), state, cu_seqlens=cu_seqlens)

    def mix(
        self,
        x: Tensor,
        state: ModelState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        streams: list[Tensor] | None = None,
        call: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """:meth:`forward` from the embeddings on, x (batch, length, d_model).

        ``streams`` is given the residual stream before the first layer and after each, each like x. Layers are run by
        ``call(layer, ...)`` if it is given: one that keeps nothing for the backward pass, say.
        """
        if state is not None:
            self._check_state(state, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        before = None if state is None else state.positions
        if self.positions is not None:
            x = self.positions(x, places(x.shape[1], x.device, before, cu_seqlens))
        residual: Tensor | None = None
        after: list[State | None] = []
        for index, layer in enumerate(self.layers):
            if streams is not None:
                streams.append(x if residual is None else x + residual)
            own = None if state is None else state.layers[index]
            run = layer if call is None else partial(call, layer)
            x, residual, own = run(x, residual, own, cu_seqlens=cu_seqlens)
            after.append(own)
        if streams is not None:
            assert residual is not None
            streams.append(x + residual)
        assert residual is not None
        hidden, _ = self.norm_f(x, residual, residual.dtype)
        if state is None:
            return hidden, None
        if before is not None:
            before = before + (x.shape[1] if cu_seqlens is None else cu_seqlens.diff())
        return hidden, ModelState(tuple(after), before)

    def step(self, tokens: Tensor, state: ModelState, *, inplace: bool = False) -> tuple[Tensor, ModelState]:
        """One token per sequence: tokens (batch,) to hidden vectors (batch, d_model)."""
        if tokens.dim() != 1 or tokens.shape[0] < 1:
            raise ArgumentError(f"tokens must be (batch,), one per sequence; got shape {tuple(tokens.shape)}")
        self.check_tokens(tokens)
        self._check_state(state, tokens.shape[0])
        x, positions = self.embedding(tokens), state.positions
        if self.positions is not None and positions is not None:
            x, positions = self.positions(x[:, None], positions[:, None])[:, 0], positions + 1
        residual: Tensor | None = None
        after: list[State | None] = []
        for block, own in zip(self.blocks, state.layers, strict=True):
            assert own is not None
            x, residual, own = block.step(x, residual, own, inplace=inplace)
            after.append(own)
        assert residual is not None
        x, _ = self.norm_f(x, residual, residual.dtype)
        return x, ModelState(tuple(after), positions)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ArgumentError unless tokens are integers and, on the CPU, all in the vocabulary."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ArgumentError(f"tokens must be int64 or int32, got {tokens.dtype}")
        # On other devices looking at values would wait for them, and in a traced graph there are none.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            check_vocabulary(tokens, self.config.vocab_size)

    def _check_state(self, state: ModelState, sequences: int) -> None:
        check_state("the model", state, ModelState, sequences)
        if len(state.layers) != len(self.layers):
            raise ArgumentError(f"state has {len(state.layers)} layers, the model {len(self.layers)}")
        if (state.positions is None) != (self.positions is None):
            raise ArgumentError("state: is of a model with other positions (config.positions)")


def check_vocabulary(tokens: Tensor, vocab_size: int, name: str = "tokens") -> None:
    """Raise ArgumentError unless all tokens lie in ``0 .. vocab_size - 1``."""
    least, most = torch.aminmax(tokens)
    if least < 0 or most >= vocab_size:
        outside = int(least) if least < 0 else int(most)
        raise ArgumentError(f"{name} must lie in 0 .. {vocab_size - 1}, the vocabulary; got {outside}")

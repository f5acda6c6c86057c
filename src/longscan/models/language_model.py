"""A language model: embedding, residual blocks of mixers, a head, and what one does with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.models.backbone import Backbone
from longscan.models.config import LanguageModelConfig
from longscan.models.generation import Generation, Prompts
from longscan.models.pretrained import load_pretrained, save_pretrained
from longscan.nn.int8 import Int8Embedding, Int8Linear, quantize_layers
from longscan.nn.sequence_parallel import whole_sequences_only
from longscan.nn.state import ModelState
from longscan.ops import linear_cross_entropy


class LanguageModel(nn.Module):
    """Next-token model over any mix of mixers.

    Parameter names follow the released Mamba models (``backbone.layers.0.mixer.A_log`` and so on).

    Args:
        config: the shape of the model.
        device: where the parameters live.
        dtype: dtype of the parameters. Parameters that a mixer needs in float32 (A, D and the bias of dt in Mamba) stay
            so.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, LanguageModelConfig):
            raise ArgumentError(
                f"config must be a LanguageModelConfig, got {type(config).__name__}; "
                "LanguageModel.from_config also takes the name of a preset or a mapping"
            )
        self.config = config
        #: "int8" after :meth:`quantize`.
        self.quantization: str | None = None
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    @classmethod
    def from_config(cls, config: LanguageModelConfig | dict[str, Any] | str, **kwargs: Any) -> LanguageModel:
        """From a configuration, a mapping of its fields, or the name of a preset (``"mamba-130m"``), random weights."""
        if isinstance(config, str):
            config = LanguageModelConfig.preset(config)
        elif not isinstance(config, LanguageModelConfig):
            config = LanguageModelConfig.from_dict(config)
        return cls(config, **kwargs)

    def tie_weights(self) -> None:
        """Make the head the embedding, if the configuration says so."""
        if not self.config.tie_embeddings:
            return
        embedding = self.backbone.embedding
        if isinstance(embedding, Int8Embedding):
            self.lm_head.values, self.lm_head.scales = embedding.values, embedding.scales
        else:
            self.lm_head.weight = embedding.weight

    @property
    def device(self) -> torch.device:
        return self.backbone.norm_f.weight.device

    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initial_state(self, batch: int, dtype: torch.dtype | None = None) -> ModelState:
        """The state before the first token, for ``batch`` sequences."""
        return self.backbone.initial_state(batch, dtype=dtype)

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of ``batch`` sequences after ``length`` tokens."""
        return self.backbone.state_bytes(batch, length)

    if TYPE_CHECKING:
        # A call is `forward`, which PyTorch's own types leave open.
        def __call__(
            self,
            tokens: Tensor,
            state: ModelState | None = None,
            cu_seqlens: Tensor | None = None,
            last_only: bool = False,
        ) -> tuple[Tensor, Any]: ...

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, ModelState | None]:
        """Scores of the next token.

        Args:
            tokens: (batch, length) integers in ``0 .. vocab_size - 1``.
            state: what the model remembers of earlier tokens; None starts afresh and carries nothing.
            cu_seqlens: (sequences + 1,) integer offsets of several sequences packed in one row (batch 1). The state's
                batch is then the number of sequences.
            last_only: only the scores after the last token of each sequence.

        Returns:
            Logits (batch, length, vocab_size), or (sequences, vocab_size) with ``last_only``, and the state after the
            tokens (None if no state was given).

        Raises:
            ArgumentError: tokens are no integers or outside the vocabulary, shapes do not fit, or the state is of
                another model or batch size. The range of tokens is checked on the CPU only: elsewhere it would cost a
                wait.
        """
        if last_only:
            whole_sequences_only("last_only", "the last token of a sequence is another process's")
        hidden, state = self.backbone(tokens, state, cu_seqlens=cu_seqlens)
        if last_only:
            hidden = hidden[:, -1] if cu_seqlens is None else hidden[0, cu_seqlens[1:].long() - 1]
        return self.head(hidden), state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab_size) of final hidden vectors (..., d_model)."""
        return self.lm_head(hidden)[..., : self.config.vocab_size]

    def step(self, tokens: Tensor, state: ModelState, *, inplace: bool = False) -> tuple[Tensor, ModelState]:
        """One token per sequence: tokens (batch,) to logits (batch, vocab_size) and the next state.

        With ``inplace`` the caller gives its state away: its memory may be reused for the next one.
        """
        hidden, state = self.backbone.step(tokens, state, inplace=inplace)
        return self.head(hidden), state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy in nats of ``targets`` given ``tokens``.

        Args:
            tokens: (batch, length) integers.
            targets: (batch, length) integers, already shifted: ``targets[:, t]`` is what follows ``tokens[:, t]``.
                Places with -100 do not count.
            cu_seqlens: offsets of sequences packed in one row, see :meth:`forward`.
            reduction: "mean" over the places that count, "sum", or "none" for (batch, length) values.

        Returns:
            float32 loss. Its memory does not grow with the vocabulary, except with ``reduction="none"``
            (:func:`longscan.ops.linear_cross_entropy`).
        """
        return self.loss_and_state(tokens, targets, cu_seqlens=cu_seqlens, reduction=reduction)[0]

    def loss_and_state(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: ModelState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor, ModelState | None]:
        """:meth:`loss` after what ``state`` remembers, and the state after the tokens (None if none was given)."""
        if targets.shape != tokens.shape:
            raise ArgumentError(
                f"targets must have the shape of tokens, {tuple(tokens.shape)}; got {tuple(targets.shape)}"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ArgumentError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        hidden, state = self.backbone(tokens, state, cu_seqlens=cu_seqlens)
        # A layer around the head (an adapter) is called, never read past.
        if reduction != "none" and type(self.lm_head) in (nn.Linear, Int8Linear):
            vocabulary = self.config.vocab_size
            loss = linear_cross_entropy(
                hidden, self.lm_head.weight, targets, vocab_size=vocabulary, reduction=reduction
            )
            return loss, state
        logits = self.head(hidden)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.long().flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss, state

    def generate(self, prompts: Prompts, max_new_tokens: int, **options: Any) -> Generation:
        """Continue prompts; options and result: :class:`longscan.models.generation.Generation`.

        >>> out = model.generate([[1, 2, 3], [4]], 20, temperature=0.8, top_p=0.95, seed=0)
        >>> out.tokens          # new tokens, one list per prompt
        """
        return Generation(self, prompts, max_new_tokens, **options).run()

    def stream(self, prompts: Prompts, max_new_tokens: int | None = None, **options: Any) -> Generation:
        """As :meth:`generate`, but token by token: iterate over the result.

        >>> for item in model.stream(prompt, 100, decode=tokenizer.decode):
        ...     print(item.text, end="", flush=True)
        """
        return Generation(self, prompts, max_new_tokens, keep_tokens=False, **options)

    def quantize(self, weights: str = "int8") -> LanguageModel:
        """Turn the matrices (projections, embedding, head) into int8, in place; returns the model itself.

        Each row is cut into groups of 128 columns that share a float32 scale; everything else becomes float32. It takes
        a quarter of the memory, and on the CPU a Mamba decodes about three times as fast as in float32. What was
        quantised is for inference: it is not trained. Saved with :meth:`save_pretrained`, it is read back as it is.

        Raises:
            ArgumentError: another format than "int8", a model that is quantised already, or weights that are not
                finite.
        """
        if weights != "int8":
            raise ArgumentError(f'weights must be "int8", got {weights!r}')
        if self.quantization is not None:
            raise ArgumentError(f"the model's weights are {self.quantization} already")
        quantize_layers(self)
        self.tie_weights()
        self.quantization = weights
        return self.float()

    def save_pretrained(self, folder: str | os.PathLike[str], format: str = "longscan") -> Path:
        """Write ``config.json`` and the weights; a write that fails leaves the old files untouched.

        Args:
            folder: made if it is not there.
            format: "longscan"; "mamba-ssm", the released models' layout; or "transformers", which
                ``MambaForCausalLM`` reads (and vLLM, and llama.cpp's converter).

        Raises:
            ConfigError: the format cannot say what the model is (other mixers, a complex A, int8 weights).
            StorageError: a file could not be written.
        """
        return save_pretrained(self, folder, format)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        subfolder: str = "",
    ) -> LanguageModel:
        """Read a saved model: ours, one of mamba-ssm (``state-spaces/mamba-130m``), or Transformers' Mamba or Falcon
        Mamba.

        Args:
            source: a folder, or the name of a repository on the Hugging Face Hub (with the extra ``hub``).
            device: where the parameters go. Until they are there, weights are mapped from the file, not copied.
            dtype: of the parameters; those that a mixer needs in float32 stay so.
            revision: of the repository.
            subfolder: where in the folder or the repository the model is.

        Raises:
            ArgumentError: ``dtype`` is none of PyTorch's floating ones.
            CheckpointError: a file is missing, damaged or truncated, or the weights do not fit the configuration.
        """
        return load_pretrained(cls, source, device=device, dtype=dtype, revision=revision, subfolder=subfolder)

"""`mamba_ssm.models`: the language model under their names, with their parameters, cache and checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.block import Block, GatedMLP
from longscan.integrations.mamba_ssm.checkpoints import load_config_hf, load_state_dict_hf
from longscan.integrations.mamba_ssm.decoding import compiled_step
from longscan.integrations.mamba_ssm.generation import GenerationMixin, InferenceParams
from longscan.integrations.mamba_ssm.module import Mamba
from longscan.integrations.mamba_ssm.norm import RMSNorm, layer_norm_fn
from longscan.models.pretrained import CONFIG_FILE, PICKLED_FILE
from longscan.nn.storage import save_pickled, write_text

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclasses.dataclass
class MambaConfig:
    """Shape of a `MambaLMHeadModel`, the fields of mamba-ssm's ``config.json``."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_layer_idx: list[int] = dataclasses.field(default_factory=list)
    attn_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """One residual block with a Mamba mixer.

    Raises:
        ArgumentError: the layer is to be attention or another mixer than "Mamba1": longscan has no stand-in for those.
    """
    if layer_idx in (attn_layer_idx or ()):
        raise ArgumentError(
            f"attn_layer_idx: layer {layer_idx} is to be attention; longscan has no stand-in for mamba_ssm's MHA"
        )
    options = copy.deepcopy(ssm_cfg or {})
    kind = options.pop("layer", "Mamba1")
    if kind != "Mamba1":
        raise ArgumentError(f"ssm_cfg: got layer {kind!r}; longscan has a stand-in for 'Mamba1' only")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **factory)
    block = Block(
        d_model,
        partial(Mamba, layer_idx=layer_idx, **options, **factory),
        mlp,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Start a module as the released models do, for `nn.Module.apply`.

    Embeddings N(0, initializer_range^2), biases of linear layers zero unless marked `_no_reinit`, and a module's own
    `out_proj` or `fc2` drawn anew and divided by the root of the number of branches (as in GPT-2).
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Tokens (batch, length) to final hidden vectors (batch, length, d_model)."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32,
                fused_add_norm, layer_idx, **factory,
            )
            for layer_idx in range(n_layer)
        )  # fmt: skip
        self.norm_f: Any = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **factory)
        branches = 2 if d_intermediate else 1
        self.apply(
            partial(_init_weights, n_layer=n_layer, **(initializer_cfg or {}), n_residuals_per_layer=branches)
        )  # fmt: skip

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Each layer's states by its number."""
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
            for index, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """Hidden vectors; `inference_params` as in `Mamba.forward`."""
        x, residual = self.embedding(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, inference_params=inference_params, **mixer_kwargs)
        norm = self.norm_f
        if self.fused_add_norm:
            out: Tensor = layer_norm_fn(
                x, norm.weight, norm.bias, residual=residual, eps=norm.eps, residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(norm, RMSNorm),
            )  # fmt: skip
        else:
            out = norm((x if residual is None else x + residual).to(norm.weight.dtype))
        return out


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model of `state-spaces/mamba-130m` and its like.

    Args:
        config: a `MambaConfig` with "Mamba1" layers and no attention.
        initializer_cfg: keyword arguments of `_init_weights`.

    Raises:
        ArgumentError: the configuration asks for layers that longscan has no stand-in for.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            rows,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **factory,
        )
        self.lm_head = nn.Linear(config.d_model, rows, bias=False, **factory)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Each layer's states by its number."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Scores of the next token.

        Args:
            input_ids: (batch, length).
            position_ids: not used; for callers that give them.
            inference_params: as in `Mamba.forward`.
            num_last_tokens: only the scores after the last so many tokens; 0 means all.

        Returns:
            A named tuple with `logits` (batch, length, padded vocabulary).
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden))

    def decoding_step(self, cache: InferenceParams) -> Callable[[Tensor], Tensor] | None:
        """See `compiled_step`; `decode` asks for it."""
        return compiled_step(self, cache)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """Read a model of mamba-ssm, Transformers (Mamba) or longscan.

        Args:
            pretrained_model_name: a folder, or the name of a repository on the Hugging Face Hub.
            device, dtype: of the parameters.
            kwargs: of the constructor.

        Raises:
            CheckpointError: a file is missing, damaged or truncated.
            ConfigError: the model is not one that this class can be.
        """
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        # In the dtype of the file: A and D are float32 in the model whatever the other parameters are.
        tensors = load_state_dict_hf(pretrained_model_name, device=device)
        if config.tie_embeddings:
            # Formats that leave out what is said already.
            tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
        model.load_state_dict(tensors)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``pytorch_model.bin`` and ``config.json``, each whole or not at all.

        Raises:
            StorageError: a file could not be written; what was there before is untouched.
        """
        folder = Path(save_directory)
        save_pickled(folder / PICKLED_FILE, self.state_dict())
        write_text(folder / CONFIG_FILE, json.dumps(dataclasses.asdict(self.config), indent=4) + "\n")

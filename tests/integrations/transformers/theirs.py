"""Small random models of Transformers, without downloads, and what one runs on them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("mamba", "falcon_mamba", "jamba", "zamba")
VOCABULARY = 23

_HYBRID: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 3,
}  # fmt: skip


def make(family: str, **changes: Any) -> Any:
    """A causal language model whose next token depends clearly on its past."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "mamba": {"hidden_size": 16, "num_hidden_layers": 3, "state_size": 4},
        "falcon_mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "jamba": {
            **_HYBRID, "num_hidden_layers": 4, "num_key_value_heads": 1, "num_experts": 2, "attn_layer_period": 4,
            "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
        },
        "zamba": {
            **_HYBRID, "num_hidden_layers": 6, "num_key_value_heads": 2, "n_mamba_heads": 2, "attn_layer_period": 3,
            "attn_layer_offset": 1,
        },
    }[family]  # fmt: skip
    plain: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, vocab_size=VOCABULARY, **{**options, **plain, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("A_log"):
                # Zamba's heads start so small that their states hardly count.
                parameter += (0.2 if family == "zamba" else 0.1) * torch.randn_like(parameter)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Tokens of which none is padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def cache_name(model: Any) -> str:
    """What the model's argument and output are called; it has changed with versions and models."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in names)


def call(model: Any, ids: Tensor, cache: Any = None, **options: Any) -> tuple[Tensor, Any]:
    """Logits and the cache after them."""
    name = cache_name(model)
    output = model(ids, **({} if cache is None else {name: cache}), use_cache=True, **options)
    return output.logits, getattr(output, name)

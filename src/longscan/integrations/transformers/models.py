"""What stands in for the ``forward`` of whole models: padding holds the last token's output, and on the CPU a token
goes through compiled calls."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.integrations.transformers.caches import NAMES, cache_among, cache_of, output_with_cache
from longscan.integrations.transformers.memory import Memory
from longscan.integrations.transformers.padding import packing_of
from longscan.integrations.transformers.steps import TokenStep, make_step
from longscan.integrations.transformers.watch import Steps


def make_model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a model without a head whose own is ``original``.

    With a cache, padding at the end of a row gives what the last token before it gave, so that ``logits[:, -1]``, from
    which generation goes on, is every row's own. Rows that end with a token stay as they are, whatever others do.
    """
    signature = inspect.signature(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        hidden = output[0]
        if hidden.shape[1] == 1 or not _has_cache(output):
            return output
        mask = signature.bind(self, *args, **kwargs).arguments.get("attention_mask")
        if isinstance(mask, dict):
            # What `generate` makes for a static cache: one for attention, and one for recurrences.
            mask = mask.get("linear_attention")
        packing = packing_of(mask, hidden.shape[1]) if isinstance(mask, Tensor) else None
        if packing is None:
            return output
        hidden = torch.where(packing.mask[:, -1:, None], hidden, packing.hold(hidden))
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    return forward


def make_language_model_forward(output: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a causal language model, whose own is ``original``: a token goes through compiled calls where
    it can.

    Args:
        output: the class of what it returns, in the module of Transformers where the model is or the common one.
    """

    def forward(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        cache = None if args else cache_among(kwargs)
        if input_ids is not None and cache is not None and _one_token(self, input_ids, kwargs):
            logits = _compiled_step(self, input_ids[:, 0], cache, kwargs.get("attention_mask"))
            if logits is not None:
                kind = getattr(importlib.import_module(original.__module__), output)
                return output_with_cache(kind, cache, logits=logits[:, None])
        return original(self, input_ids, *args, **kwargs)

    return forward


def _has_cache(output: Any) -> bool:
    if not isinstance(output, tuple):
        return cache_of(output) is not None
    from transformers.cache_utils import Cache

    return any(isinstance(item, Cache) for item in output)


# Arguments that a compiled step need not look at: they say nothing about one token with a cache.
_HARMLESS = frozenset((*NAMES, "use_cache", "logits_to_keep", "return_dict", "attention_mask", "position_ids"))


def _one_token(model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for no more than the scores after one token, and does not record gradients."""
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if tokens.dim() != 2 or tokens.shape[1] != 1 or kwargs.get("use_cache") is False:
        return False
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in _HARMLESS):
        return False
    config, keep, returned = model.config, kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
    if keep not in (0, 1) or not (config.return_dict if returned is None else returned):
        return False
    asked = (config.output_hidden_states, config.output_attentions, getattr(config, "output_router_logits", False))
    if any(asked) or (kwargs.get("use_cache") is None and (model.training or not config.use_cache)):
        return False
    mask = kwargs.get("attention_mask")
    # With a static cache it is a dictionary of masks that are ready for attention.
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, -1] != 0).all()))


def _compiled_step(model: Any, tokens: Tensor, cache: Any, mask: Tensor | None) -> Tensor | None:
    """Scores (batch, vocabulary) after one token, the cache moved on; None where the compiled step cannot serve."""
    with _steps.borrow(model) as step:
        if step is None:
            return None
        memory = _memories.get(cache)
        if memory is None or not memory.holds(cache):
            memory = Memory.of(cache, step.layers)
            if memory is None:
                return None
            _memories[cache] = memory
        added = None
        if not step.whole:
            if type(cache).__name__ != "DynamicCache" or (mask is not None and mask.shape[1] != _length(cache) + 1):
                return None
            if model.training:
                # Attention drops out.
                return None
            added = _added(mask, model.dtype)
        memory.load()
        try:
            logits = step(tokens, memory.states, cache, added)
        except ArgumentError:
            # A cache of another model or batch, a token out of range: the original says it in its own words.
            return None
        memory.store()
        # Mamba and Falcon Mamba give float32 whatever they are.
        return logits if step.whole else logits.to(model.lm_head.weight.dtype)


def _length(cache: Any) -> int:
    length: int = cache.get_seq_length()
    return length


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of attention for a mask (batch, past + 1): (batch, 1, 1, past + 1), or None."""
    if mask is None or bool((mask != 0).all()):
        return None
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


_steps: Steps[TokenStep] = Steps(make_step)
_memories: weakref.WeakKeyDictionary[Any, Memory] = weakref.WeakKeyDictionary()

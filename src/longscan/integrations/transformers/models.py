"""What stands in for the ``forward`` of whole models: padding holds the last token's output, and on the CPU a token is
one compiled call."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError, BackendError
from longscan.integrations.transformers.caches import NAMES, cache_among, cache_of, output_with_cache
from longscan.integrations.transformers.padding import packing_of
from longscan.integrations.transformers.watch import Steps
from longscan.nn.linear import is_plain
from longscan.ops.mamba_step import MambaDecoder, MambaStepWeights


def make_model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a model without a head whose own is ``original``.

    With a cache, padding on the right gives what the last token before it gave, so that ``logits[:, -1]``, from which
    generation goes on, is every row's own.
    """
    signature = inspect.signature(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.shape[1] == 1 or cache_of(output) is None:
            return output
        mask = signature.bind(self, *args, **kwargs).arguments.get("attention_mask")
        packing = packing_of(mask, hidden.shape[1]) if isinstance(mask, Tensor) else None
        if packing is not None and not bool(packing.mask[:, -1].all()):
            output.last_hidden_state = packing.hold(hidden)
        return output

    return forward


def make_language_model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of MambaForCausalLM, whose own is ``original``: a token is one compiled call where it can be."""

    def forward(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        cache = None if args else cache_among(kwargs)
        if input_ids is not None and cache is not None and _one_token(self, input_ids, kwargs):
            logits = _compiled_step(self, input_ids[:, 0], cache)
            if logits is not None:
                from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput

                return output_with_cache(MambaCausalLMOutput, cache, logits=logits[:, None])
        return original(self, input_ids, *args, **kwargs)

    return forward


# Arguments that a compiled step need not look at: they say nothing about one token with a cache.
_HARMLESS = frozenset((*NAMES, "use_cache", "logits_to_keep", "return_dict", "attention_mask"))


def _one_token(model: Any, tokens: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for no more than the scores after one token, and does not record gradients."""
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if tokens.dim() != 2 or tokens.shape[1] != 1 or kwargs.get("use_cache") is False:
        return False
    if any(value is not None for name, value in kwargs.items() if name not in _HARMLESS):
        return False
    config, keep, returned = model.config, kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
    if keep not in (0, 1) or not (config.return_dict if returned is None else returned):
        return False
    if config.output_hidden_states or (kwargs.get("use_cache") is None and (model.training or not config.use_cache)):
        return False
    mask = kwargs.get("attention_mask")
    return mask is None or (mask.dim() == 2 and bool((mask[:, -1] != 0).all()))


def _compiled_step(model: Any, tokens: Tensor, cache: Any) -> Tensor | None:
    """Scores (batch, vocabulary) after one token, the cache moved on; None where the compiled step cannot serve."""
    with _steps.borrow(model) as decoder:
        if decoder is None:
            return None
        memory = _memories.get(cache)
        if memory is None or not memory.holds(cache):
            memory = _Memory.of(cache)
            if memory is None:
                return None
            _memories[cache] = memory
        try:
            return memory.step(decoder, tokens)
        except ArgumentError:
            # A cache of another model or batch, a token out of range: the original says it in its own words.
            return None


def _decoder(model: Any) -> MambaDecoder:
    """The compiled step of a MambaForCausalLM."""
    layers = [_layer(block) for block in model.backbone.layers]
    _check_plain(model.backbone.embeddings, model.backbone.norm_f, model.lm_head)
    return MambaDecoder(
        layers,
        embedding=model.backbone.embeddings.weight,
        final_norm=model.backbone.norm_f.weight,
        head=model.lm_head.weight,
        head_bias=model.lm_head.bias,
        eps=model.backbone.norm_f.variance_epsilon,
    )


def _layer(block: Any) -> MambaStepWeights:
    mixer = block.mixer
    if mixer.activation not in ("silu", "swish") or mixer.conv_kernel_size < 2:
        raise BackendError("the compiled step serves SiLU and convolutions of at least two taps")
    _check_plain(block.norm, mixer.in_proj, mixer.conv1d, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    return MambaStepWeights(
        norm=block.norm.weight,
        eps=block.norm.variance_epsilon,
        in_proj=mixer.in_proj.weight,
        in_proj_bias=mixer.in_proj.bias,
        conv=mixer.conv1d.weight.squeeze(1),
        conv_bias=mixer.conv1d.bias,
        x_proj=mixer.x_proj.weight,
        dt_proj=mixer.dt_proj.weight,
        dt_bias=mixer.dt_proj.bias,
        A=-torch.exp(mixer.A_log.detach().float()),
        D=mixer.D,
        out_proj=mixer.out_proj.weight,
        out_proj_bias=mixer.out_proj.bias,
    )


def _check_plain(*modules: nn.Module) -> None:
    from transformers.models.mamba.modeling_mamba import MambaRMSNorm

    for module in modules:
        if not is_plain(module, nn.Linear, nn.Conv1d, nn.Embedding, MambaRMSNorm):
            raise BackendError(f"the compiled step reads plain weights, this is more than that: {module}")


class _Memory:
    """A cache's tensors, as the compiled step takes them.

    The convolution's inputs lie in the cache as (batch, channels, width), one more than it needs; the step wants
    (batch, width - 1, channels) of its own, so they are copied there and back.
    """

    def __init__(self, convs: list[Tensor], states: list[Tensor]) -> None:
        self._convs, self._ssms = convs, states
        self._tails = [conv[:, :, 1:].transpose(1, 2) for conv in convs]
        self._edges = [(conv[:, :, 0], conv[:, :, 1]) for conv in convs]
        self._windows = [torch.empty(tail.shape, dtype=tail.dtype) for tail in self._tails]
        self._states = list(zip(self._windows, states, strict=True))

    @staticmethod
    def of(cache: Any) -> _Memory | None:
        """None for a cache that is fresh, elsewhere, or keeps what a step would drop."""
        convs, states = [], []
        for layer in getattr(cache, "layers", ()):
            if getattr(layer, "record_past", True) or not all(layer.has_previous_state.values()):
                return None
            conv, state = layer.conv_states[0], layer.recurrent_states[0]
            if len(layer.conv_states) != 1 or conv is None or state is None or conv.shape[-1] < 2:
                return None
            if conv.requires_grad or state.requires_grad or conv.device.type != "cpu":
                return None
            convs.append(conv)
            states.append(state)
        return _Memory(convs, states) if convs else None

    def holds(self, cache: Any) -> bool:
        """Whether these still are the cache's tensors (a beam search replaces them, a reset empties them)."""
        return len(cache.layers) == len(self._convs) and all(
            layer.conv_states[0] is conv
            and layer.recurrent_states[0] is ssm
            and layer.has_previous_state[0]
            and not layer.record_past
            for layer, conv, ssm in zip(cache.layers, self._convs, self._ssms, strict=True)
        )

    def step(self, decoder: MambaDecoder, tokens: Tensor) -> Tensor:
        for window, tail in zip(self._windows, self._tails, strict=True):
            window.copy_(tail)
        logits = decoder.step(tokens, self._states)
        for (first, second), tail, window in zip(self._edges, self._tails, self._windows, strict=True):
            first.copy_(second)
            tail.copy_(window)
        return logits


_steps = Steps(_decoder)
_memories: weakref.WeakKeyDictionary[Any, _Memory] = weakref.WeakKeyDictionary()

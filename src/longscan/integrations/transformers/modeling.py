"""Our language model as one of Transformers', with its cache, its padding and its ways of loading."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longscan.errors import ArgumentError, CheckpointError
from longscan.integrations.transformers.caches import output_with_cache
from longscan.integrations.transformers.configuration import LongscanConfig
from longscan.integrations.transformers.padding import packing_of
from longscan.integrations.transformers.watch import Steps
from longscan.models.backbone import Backbone
from longscan.models.decoding import CompiledStepper
from longscan.models.language_model import LanguageModel
from longscan.models.pretrained import QUANTIZATION
from longscan.nn.state import ModelState


class LongscanCache(Cache):
    """What a model remembers, where Transformers expects keys and values.

    Attributes:
        state: of all layers, one sequence per row of the batch; None before the first token.
        length: places that it has taken in, padding included.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: ModelState | None = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.length = state, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    def reset(self) -> None:
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The sequences ``beam_idx`` in that order, as a beam search asks for."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ArgumentError("crop: a recurrent state cannot give tokens back; keep a copy of it from before them")


class LongscanForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model over any mixers, with the weights' names of :class:`longscan.LanguageModel`.

    Args:
        config: a :class:`LongscanConfig`.

    Raises:
        CheckpointError: the configuration is one of a folder with int8 weights, which Transformers does not read.
    """

    config_class = LongscanConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (so in the base class)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LongscanConfig) -> None:
        super().__init__(config)
        if (quantization := getattr(config, QUANTIZATION, None)) is not None:
            raise CheckpointError(
                f"{config.name_or_path}: has {quantization} weights, which Transformers' loader does not read; use "
                "LanguageModel.from_pretrained, or save the model before it is quantised"
            )
        ours = config.to_longscan()
        self.backbone = Backbone(ours)
        self.lm_head = nn.Linear(ours.d_model, ours.padded_vocab_size, bias=False)
        # Transformers sets it, and with it the function that runs a layer so.
        self.gradient_checkpointing = False
        self._keep_in_fp32_modules_strict = {
            name
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if getattr(tensor, "_keep_float32", False)
        }
        self.post_init()

    @classmethod
    def from_longscan(cls, model: LanguageModel, **more: Any) -> LongscanForCausalLM:
        """The same model, sharing its weights; ``more`` are fields of the configuration (``eos_token_id`` ...).

        Raises:
            ArgumentError: its weights are quantised.
        """
        if model.quantization is not None:
            raise ArgumentError(f"model: has {model.quantization} weights, which are not Transformers'; wrap it before")
        with torch.device("meta"):
            wrapped = cls(LongscanConfig.from_longscan(model.config, **more))
        wrapped.backbone, wrapped.lm_head = model.backbone, model.lm_head
        wrapped.config.dtype = model.backbone.embedding.weight.dtype
        return wrapped.train(model.training)

    def to_longscan(self) -> LanguageModel:
        """The same model without Transformers, sharing its weights."""
        with torch.device("meta"):
            model = LanguageModel(self.backbone.config)
        model.backbone, model.lm_head = self.backbone, self.lm_head
        return model.train(self.training)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As of every model of Transformers.

        Raises:
            CheckpointError: the files lack weights, which would be left without values.
        """
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, about = loaded
        if about["missing_keys"]:
            raise CheckpointError(f"{source}: missing: {', '.join(sorted(about['missing_keys']))}")
        _mark(model)
        return (model, about) if wanted else model

    def _init_weights(self, module: nn.Module) -> None:
        """The parts have done so when they were made."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The cache is made here, not by `generate`.
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.backbone.embedding = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As of every model of Transformers; afterwards every row is a token, none is padding."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size, self.config.pad_vocab_size_multiple = embedding.num_embeddings, 1
        self.backbone.config = self.config.to_longscan()
        return embedding

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LongscanCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: LongscanCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores of the next token, and with labels the loss.

        Args:
            input_ids: (batch, length) tokens.
            attention_mask: (batch, at least length), zero at padding, wherever it stands; of a longer one the last
                columns count. Padding leaves no trace: it repeats what the last token before it gave.
            past_key_values, cache: what an earlier call returned, by either name. It is moved on in place.
            inputs_embeds: (batch, length, d_model) instead of tokens.
            labels: (batch, length), shifted inside; -100 does not count.
            use_cache: return a cache; by default the configuration's, and not in training.
            output_hidden_states: also return the residual stream before the first layer and after each.
            return_dict: False for a tuple.
            logits_to_keep: only so many places at the end, or those of an index; 0: all.

        Returns:
            loss (float32), logits (batch, length, vocab_size), past_key_values (`cache` from Transformers 5.24 on) and
            hidden_states.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("input_ids, inputs_embeds: give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, LongscanCache):
            raise ArgumentError(f"past_key_values: got a {type(cache).__name__}, expected a LongscanCache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is None and use_cache:
            cache = LongscanCache()
        streams: list[Tensor] | None = [] if output_hidden_states else None
        logits = None
        if input_ids is not None and cache is not None and streams is None:
            logits = self._step(input_ids, attention_mask, cache)
        if logits is None:
            hidden = self._mix(input_ids, inputs_embeds, attention_mask, cache, streams)
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = output_with_cache(
            CausalLMOutputWithPast,
            cache if use_cache else None,
            loss=loss,
            logits=logits,
            hidden_states=None if streams is None else tuple(streams),
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _mix(
        self,
        tokens: Tensor | None,
        x: Tensor | None,
        mask: Tensor | None,
        cache: LongscanCache | None,
        streams: list[Tensor] | None,
    ) -> Tensor:
        """Final hidden vectors (batch, length, d_model); the cache is moved on."""
        if x is None:
            assert tokens is not None
            self.backbone.check_tokens(tokens)
            x = self.backbone.embedding(tokens)
        batch, length = x.shape[:2]
        state = None if cache is None else cache.state or self.backbone.initial_state(batch)
        packing = packing_of(mask, length)
        options: dict[str, Any] = {"streams": streams}
        if self.gradient_checkpointing and self.training:
            options["call"] = self._call_twice
        if packing is None:
            hidden, after = self.backbone.mix(x, state, **options)
        elif packing.empty:
            # Zeros that depend on the weights: in training a gradient that is zero is not one that is missing.
            hidden, after = packing.hold(self.backbone.mix(x, None, **options)[0]), state
            if streams is not None:
                streams[:] = map(packing.hold, streams)
        else:
            hidden, after = self.backbone.mix(packing.pack(x), state, cu_seqlens=packing.cu_seqlens, **options)
            hidden = packing.hold(packing.unpack(hidden))
            if streams is not None:
                streams[:] = [packing.unpack(stream) for stream in streams]
        if cache is not None:
            cache.state, cache.length = after, cache.length + length
        return hidden

    def _call_twice(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A layer whose inner results are not kept: the backward pass calls it again."""
        run: Any = self._gradient_checkpointing_func
        return run(partial(layer, **kwargs), *args)

    def _step(self, tokens: Tensor, mask: Tensor | None, cache: LongscanCache) -> Tensor | None:
        """Scores (batch, 1, vocabulary) after one token where nothing records gradients, else None."""
        if tokens.shape[1] != 1 or cache.state is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if packing_of(mask, 1) is not None:
            return None
        if tokens.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            with _borrow(self) as stepper:
                if stepper is not None:
                    logits, cache.state = stepper.step(tokens[:, 0], cache.state)
                    cache.length += 1
                    return logits[:, None]
        hidden, cache.state = self.backbone.step(tokens[:, 0], cache.state, inplace=True)
        cache.length += 1
        logits = self.lm_head(hidden)[..., : self.config.vocab_size]
        return logits[:, None]

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, run: str | Path | None = None, **options: Any
    ) -> str:
        """Upload the model and, where the repository has none yet, a card that says what was measured.

        Args:
            repo_id: "name" or "organisation/name".
            run: folder of the run that trained it; its figures go into the card.
            options: private, token, revision, create_pr, commit_message, commit_description, tags, max_shard_size; as
                of every model of Transformers.

        Returns:
            Address of the commit.
        """
        from longscan.integrations.transformers.card import upload

        return upload(self, repo_id, run, **options)


_steppers: Steps[CompiledStepper] = Steps(lambda model: CompiledStepper(model))


def _borrow(model: LongscanForCausalLM) -> AbstractContextManager[CompiledStepper | None]:
    return _steppers.borrow(model)


def _mark(model: LongscanForCausalLM) -> None:
    """Loading makes new tensors: give them the marks (no weight decay, float32) that the mixers give theirs."""
    with torch.device("meta"):
        twin = Backbone(model.backbone.config)
    marks = {name: vars(tensor) for name, tensor in (*twin.named_parameters(), *twin.named_buffers())}
    for name, tensor in (*model.backbone.named_parameters(), *model.backbone.named_buffers()):
        vars(tensor).update(marks.get(name, {}))

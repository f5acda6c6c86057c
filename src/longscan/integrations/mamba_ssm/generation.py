"""`mamba_ssm.utils.generation`: the cache, sampling and decoding as their callers know them."""

from __future__ import annotations

import abc
import dataclasses
import logging
import time
from typing import Any

import torch
from torch import Tensor

from longscan.errors import ArgumentError

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class InferenceParams:
    """What a model keeps between calls.

    Attributes:
        max_seqlen, max_batch_size: the largest it is made for.
        seqlen_offset: tokens taken in so far; the caller counts.
        batch_size_offset: not used.
        key_value_memory_dict: each layer's states by its number.
        lengths_per_sample: not used.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin a new sequence. States stay where they are; the next prompt overwrites them."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclasses.dataclass
class DecoderOutput:
    """Tokens and, if asked for, scores; the fields of Transformers' `GenerateDecoderOnlyOutput` that are filled.

    Attributes:
        sequences: (batch, length), prompts included.
        scores: one (batch, vocabulary) per new token, before sampling; None unless asked for.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in ("sequences", "scores"):
            raise KeyError(name)
        return getattr(self, name)


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """One token per row, (batch,), by PyTorch's generator.

    Args:
        logits: (batch, vocabulary).
        top_k: 1 takes the likeliest; k > 1 draws from the k likeliest; 0 from all.
        top_p: of these draw from the likeliest whose probabilities first reach p together; 0 or 1 is off.
        min_p: with a top_k of 0, instead of top_p: draw from those at least min_p times as likely as the likeliest,
            judged before the temperature.
        temperature: divides the scores, before top_p; 1 leaves them.

    Raises:
        ArgumentError: top_p above 1.
    """
    if top_k == 1:
        return logits.argmax(dim=-1)
    if top_p > 1:
        raise ArgumentError(f"top_p: got {top_p}, allowed is at most 1 (0 and 1: off)")
    indices = None
    if top_k > 0:
        logits, indices = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    by_ratio = indices is None and min_p > 0
    if by_ratio:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)
    if temperature != 1.0:
        logits = logits / temperature
    if not by_ratio:
        logits = _likeliest(logits, top_p)
    chosen = torch.multinomial(logits.softmax(dim=-1), 1)
    return (chosen if indices is None else indices.gather(1, chosen)).squeeze(1)


def _likeliest(logits: Tensor, top_p: float) -> Tensor:
    """Scores outside the nucleus become -inf."""
    if not 0 < top_p < 1:
        return logits
    ordered, places = logits.sort(dim=-1)
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    return logits.masked_fill(outside.scatter(1, places, outside), -torch.inf)


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of tokens seen before, divided by the penalty where positive, else multiplied (Keskar et al. 2019)."""
    score = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(score < 0, score * penalty, score / penalty))


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> DecoderOutput:
    """Continue prompts of one length.

    Args:
        input_ids: (batch, length).
        model: called as `MambaLMHeadModel` is; if it has a `decoding_step`, that may take over after the prompt.
        max_length: of prompt and new tokens together. At least one new token comes.
        top_k, top_p, min_p, temperature: see `sample`.
        repetition_penalty: of tokens of the prompt and the output; 1 does nothing.
        eos_token_id: ends the generation when all rows give it at one time.
        teacher_outputs: (batch, length); where it has a token, that one is taken instead of a sampled one.
        vocab_size: scores beyond it are dropped.
        cg: accepted; on an NVIDIA GPU a model of plain Mamba layers is stepped by a CUDA graph whatever it says.
        enable_timing: log how long it took, at level INFO.
        output_scores: keep the scores of each step.
        streamer: an object with `put(tokens)` and `end()`, such as Transformers' `TextStreamer`.
    """
    begin = time.perf_counter()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch = input_ids.shape[0]
    cache = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    taught = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    tokens, scores = input_ids, []
    current = input_ids
    step = None
    while True:
        if cache.seqlen_offset == input_ids.shape[1] and hasattr(model, "decoding_step"):
            step = model.decoding_step(cache)
        if step is None:
            offset = cache.seqlen_offset
            places = current.new_full((batch, 1), offset) if offset else None
            logits = model(current, position_ids=places, inference_params=cache, num_last_tokens=1).logits.squeeze(1)
        else:
            logits = step(current.squeeze(1))
        logits = logits if vocab_size is None else logits[..., :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        cache.seqlen_offset += current.shape[1]
        if repetition_penalty != 1.0:
            logits = _penalised(logits, tokens, repetition_penalty)
        if teacher_outputs is not None and cache.seqlen_offset < taught:
            chosen = teacher_outputs[:, cache.seqlen_offset]
        else:
            chosen = sample(logits, top_k, top_p, min_p, temperature)
        current = chosen[:, None]
        tokens = torch.cat([tokens, current], dim=1)
        if streamer is not None:
            streamer.put(current.cpu())
        ended = eos_token_id is not None and bool((current == eos_token_id).all())
        if ended or cache.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        _logger.info("prompt processing and decoding took %.0f ms", 1e3 * (time.perf_counter() - begin))
    return DecoderOutput(tokens, tuple(scores))


class GenerationMixin(abc.ABC):
    """Gives a model `generate`."""

    @abc.abstractmethod
    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Each layer's states before the first token, by the layer's number."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | DecoderOutput:
        """Continue prompts; `kwargs` and the other arguments are those of `decode`.

        Returns:
            (batch, length) tokens, prompts included, or with `return_dict_in_generate` an object that holds them as
            `sequences`, and `scores`.
        """
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
            output_scores=output_scores, **kwargs,
        )  # fmt: skip
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences

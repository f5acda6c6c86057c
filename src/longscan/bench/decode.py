"""`longscan bench decode`: one token after another through a language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longscan import ops
from longscan.bench import floors
from longscan.bench.contest import DTYPES, Call, Contender, Settings, compare, describe, floor
from longscan.bench.models import exact, make_model, random_tokens, weight_bytes
from longscan.bench.peers import huggingface, llama_cpp, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.models import LanguageModel
from longscan.models.decoding import make_stepper

AXES = "layers,d_model,vocabulary,tokens"


def run(settings: Settings) -> Report:
    """The 130M model, 64 tokens one by one from an empty past, one sequence, in tokens per second.

    Everyone is fed the same tokens, and the last scores are compared with those of the definition over the whole
    sequence at once. Choosing a token from the scores is not part of the time.
    """
    shapes = settings.shapes_of(AXES, (24, 768, 50277, 64))
    rows: list[Row] = []
    bandwidth = floors.read_bandwidth(settings.device)
    for shape in shapes:
        for dtype in settings.dtypes_of("float32", "bfloat16"):
            rows += _measure(shape, dtype, settings, bandwidth)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "bandwidth": bandwidth}
    return Report("decode", "tokens/s", higher_is_better=True, rows=rows, settings=about)


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings, bandwidth: float) -> list[Row]:
    layers, d_model, vocabulary, count = shape
    model = make_model(layers, d_model, vocabulary, DTYPES[dtype], settings.device, settings.seed)
    tokens = random_tokens(count, vocabulary, settings.seed).to(settings.device)
    group = describe(shape, dtype)
    with torch.no_grad(), ops.backend("reference"):
        truth = exact(model)(tokens[None], last_only=True)[0]

    def to_value(seconds: float) -> float:
        return count / seconds

    contenders = [Contender("longscan", "ours", lambda: _ours(model, tokens))]
    peers: dict[str, Callable[[], Call]] = {
        "reference": lambda: _reference(model, tokens),
        "transformers": lambda: _transformers(model, tokens),
        "mambapy": lambda: _mambapy(model, tokens),
        "llama.cpp": lambda: _llama_cpp(model, tokens),
        "mamba-ssm": lambda: _mamba_ssm(model, tokens),
    }
    contenders += [Contender(name, "peer", peers[name]) for name in settings.peers]
    rows = compare(group, contenders, (truth,), settings, dtype=DTYPES[dtype], to_value=to_value)
    # Measured again: other work on the machine may have slowed the first time.
    bandwidth = max(bandwidth, floors.read_bandwidth(settings.device))
    seconds = count * weight_bytes(model) / bandwidth
    return [*rows, floor(group, "weights", seconds, to_value, "every weight read once a token")]


def _ours(model: LanguageModel, tokens: Tensor) -> Call:
    stepper = make_stepper(model)

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        state = model.initial_state(1)
        for token in tokens:
            logits, state = stepper.step(token[None], state)
        return (logits,)

    return call


def _reference(model: LanguageModel, tokens: Tensor) -> Call:
    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        state = model.initial_state(1)
        with ops.backend("reference"):
            for token in tokens:
                logits, state = model.step(token[None], state)
        return (logits,)

    return call


def _transformers(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = huggingface.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        logits, state = huggingface.prefill(peer, tokens[None, :1])
        for token in tokens[1:]:
            logits, state = huggingface.decode(peer, token[None], state)
        return (logits[:, :vocabulary],)

    return call


def _mambapy(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = mambapy.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        state = None
        for token in tokens:
            logits, state = mambapy.decode(peer, token[None], state)
        return (logits[:, :vocabulary],)

    return call


def _llama_cpp(model: LanguageModel, tokens: Tensor) -> Call:
    if model.device.type != "cpu":
        raise ImportError("llama.cpp is compared on the CPU only")
    peer = llama_cpp.Model(model, context=tokens.shape[0], threads=torch.get_num_threads())
    vocabulary = model.config.vocab_size

    def call() -> tuple[Tensor, ...]:
        peer.reset()
        for token in tokens:
            logits = peer.decode(token[None])
        return (logits[:, :vocabulary],)

    return call


def _mamba_ssm(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = mamba_ssm.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        logits, state = mamba_ssm.prefill(peer, tokens[None, :1], max_length=tokens.shape[0])
        for token in tokens[1:]:
            logits, state = mamba_ssm.decode(peer, token[None], state)
        return (logits[:, :vocabulary],)

    return call

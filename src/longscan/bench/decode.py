"""`longscan bench decode`: one token after another through a language model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from longscan import ops
from longscan.bench import floors
from longscan.bench.contest import DTYPES, INT8, Call, Contender, Settings, beside, compare, describe, floor
from longscan.bench.models import exact, make_model, make_transformer, random_tokens, shapes_of, weight_bytes
from longscan.bench.peers import huggingface, llama_cpp, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.mixers.attention import AttentionState
from longscan.mixers.mamba import MambaState
from longscan.models import LanguageModel
from longscan.models.decoding import make_stepper
from longscan.nn.state import ModelState, State

#: Up to so many sequences a GPU reads little else than weights.
_FEW = 4

#: Tokens that come before those that the Transformer++ is timed with.
_CONTEXT = 2048

AXES = "layers,d_model,vocabulary,batch,tokens"


def run(settings: Settings) -> Report:
    """The 130M model, 64 tokens one by one from an empty past, in tokens per second over all sequences.

    One sequence, on a GPU also 128 of them. Everyone is fed the same tokens, and the last scores are compared with
    those of the definition over the whole sequence at once. Choosing a token from the scores is not part of the time.
    With int8 weights the peer is llama.cpp with its q8_0; both are compared with the definition in float32.
    mamba-ssm decodes as its own `generate(..., cg=True)` does: one token is one replay of its CUDA graph. On a GPU,
    beside them, a Transformer++ of as many parameters, with 2,048 tokens of context already in memory.
    """
    on_cpu = settings.device == "cpu"
    batches = (1,) if on_cpu else (1, 128)
    shapes = shapes_of(settings, AXES, *((24, 768, 50277, batch, 64) for batch in batches))
    rows: list[Row] = []
    bandwidth = floors.read_bandwidth(settings.device)
    for shape in shapes:
        for dtype in settings.dtypes_of(*(("float32", "bfloat16", INT8) if on_cpu else ("bfloat16",))):
            measure = _measure_int8 if dtype == INT8 else _measure
            rows += measure(shape, dtype, settings, bandwidth)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "bandwidth": bandwidth}
    return Report("decode", "tokens/s", higher_is_better=True, rows=rows, settings=about)


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings, bandwidth: float) -> list[Row]:
    layers, d_model, vocabulary, batch, count = shape
    model = make_model(layers, d_model, vocabulary, DTYPES[dtype], settings.device, settings.seed)
    tokens = random_tokens(batch * count, vocabulary, settings.seed).view(batch, count).to(settings.device)
    group = describe(shape, dtype)
    with torch.no_grad(), ops.backend("reference"):
        truth = exact(model)(tokens, last_only=True)[0]

    def to_value(seconds: float) -> float:
        return batch * count / seconds

    contenders = [Contender("longscan", "ours", lambda: _ours(model, tokens))]
    moved = count * (weight_bytes(model) + 2 * model.state_bytes(batch))
    if settings.device == "cuda" and batch > _FEW and dtype != "float32":
        contenders.append(_with_short_states(model, tokens, moved))
    peers: dict[str, Callable[[], Call]] = {
        "reference": lambda: _reference(model, tokens),
        "transformers": lambda: _transformers(model, tokens),
        "transformers+longscan": lambda: huggingface.accelerated(_transformers(model, tokens)),
        "mambapy": lambda: _mambapy(model, tokens),
        "llama.cpp": lambda: _llama_cpp(model, tokens),
        "mamba-ssm": lambda: _mamba_ssm(model, tokens),
    }
    contenders += [Contender(name, "peer", peers[name]) for name in settings.peers_of(*peers)]
    if settings.peers_of("transformer++", on_request=("transformer++",) if settings.device == "cpu" else ()):
        contenders.append(_transformer(shape, dtype, settings, tokens, bandwidth))
    rows = compare(group, contenders, (truth,), settings, dtype=DTYPES[dtype], to_value=to_value, moved=moved)
    # Measured again: other work on the machine may have slowed the first time.
    bandwidth = max(bandwidth, floors.read_bandwidth(settings.device))
    note = "every weight read, every state read and written, once a token"
    return beside(rows, [floor(group, "memory", moved / bandwidth, to_value, note)])


def _measure_int8(shape: tuple[int, ...], dtype: str, settings: Settings, bandwidth: float) -> list[Row]:
    layers, d_model, vocabulary, batch, count = shape
    model = make_model(layers, d_model, vocabulary, torch.float32, settings.device, settings.seed)
    quantized = copy.deepcopy(model).quantize()
    tokens = random_tokens(batch * count, vocabulary, settings.seed).view(batch, count)
    group = describe(shape, dtype)
    with torch.no_grad(), ops.backend("reference"):
        truth = exact(model)(tokens, last_only=True)[0]

    def to_value(seconds: float) -> float:
        return batch * count / seconds

    contenders = [Contender("longscan", "ours", lambda: _ours(quantized, tokens))]
    for name in settings.peers_of("llama.cpp"):
        contenders.append(Contender(name, "peer", lambda: _llama_cpp(model, tokens, int8=True), note="q8_0"))
    moved = count * (weight_bytes(quantized) + 2 * quantized.state_bytes(batch))
    # Rounding weights to int8 costs about what rounding everything to bfloat16 does.
    rows = compare(group, contenders, (truth,), settings, dtype=torch.bfloat16, to_value=to_value, moved=moved)
    bandwidth = max(bandwidth, floors.read_bandwidth(settings.device))
    note = "every weight and its scale read, every state read and written, once a token"
    return beside(rows, [floor(group, "memory", moved / bandwidth, to_value, note)])


def _with_short_states(model: LanguageModel, tokens: Tensor, moved: float) -> Contender:
    """Ours with the states in the dtype of the weights: half of what they are moves less, twice."""
    batch, count = tokens.shape
    states = sum(own.ssm.nbytes for own in model.initial_state(batch).layers if isinstance(own, MambaState))
    return Contender(
        "longscan, short states",
        "ours",
        lambda: _ours(model, tokens, short_states=True),
        moved=moved - count * states,
        note="states in the dtype of the weights, as mamba-ssm has them",
    )


def _ours(model: LanguageModel, tokens: Tensor, *, short_states: bool = False) -> Call:
    stepper = make_stepper(model, short_states=short_states)

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        state = model.initial_state(tokens.shape[0])
        for column in tokens.unbind(1):
            logits, state = stepper.step(column, state)
        return (logits,)

    return call


def _reference(model: LanguageModel, tokens: Tensor) -> Call:
    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        state = model.initial_state(tokens.shape[0])
        with ops.backend("reference"):
            for column in tokens.unbind(1):
                logits, state = model.step(column, state)
        return (logits,)

    return call


def _transformers(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = huggingface.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        logits, state = huggingface.prefill(peer, tokens[:, :1])
        for column in tokens[:, 1:].unbind(1):
            logits, state = huggingface.decode(peer, column, state)
        return (logits[:, :vocabulary],)

    return call


def _mambapy(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = mambapy.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        state = None
        for column in tokens.unbind(1):
            logits, state = mambapy.decode(peer, column, state)
        return (logits[:, :vocabulary],)

    return call


def _llama_cpp(model: LanguageModel, tokens: Tensor, int8: bool = False) -> Call:
    if model.device.type != "cpu" or tokens.shape[0] != 1:
        raise ImportError("llama.cpp is compared on the CPU only, with one sequence")
    peer = llama_cpp.Model(model, context=tokens.shape[1], threads=torch.get_num_threads(), int8=int8)
    vocabulary = model.config.vocab_size

    def call() -> tuple[Tensor, ...]:
        peer.reset()
        for column in tokens.unbind(1):
            logits = peer.decode(column)
        return (logits[:, :vocabulary],)

    return call


def _transformer(shape: tuple[int, ...], dtype: str, settings: Settings, tokens: Tensor, bandwidth: float) -> Contender:
    """Attention instead, over a context that is there already; its tokens come behind it."""
    layers, d_model, vocabulary, batch, count = shape
    model = make_transformer(layers, d_model, vocabulary, DTYPES[dtype], "meta", settings.seed)
    moved = count * (weight_bytes(model) + model.state_bytes(batch, _CONTEXT + count // 2))

    def prepare() -> Call:
        model = make_transformer(layers, d_model, vocabulary, DTYPES[dtype], settings.device, settings.seed)
        past = tuple(_random_past(own, count) for own in model.initial_state(batch).layers)
        stepper = make_stepper(model)

        @torch.no_grad()
        def call() -> tuple[Tensor, ...]:
            # The same memory in every pass: what it wrote behind the context does not count yet.
            state = ModelState(tuple(replace(own, lengths=own.lengths.clone()) for own in past))
            for column in tokens.unbind(1):
                logits, state = stepper.step(column, state)
            return (logits,)

        return call

    size = f"{model.num_parameters() / 1e6:.4g} million parameters"
    note = f"something else: attention, {size}, {_CONTEXT} tokens of context"
    return Contender("transformer++", "other", prepare, moved=moved, floor=moved / bandwidth, note=note)


def _random_past(empty: State | None, count: int) -> AttentionState:
    """Keys and values of a context, and room for so many more."""
    assert isinstance(empty, AttentionState)
    batch, heads, _, width = empty.keys.shape
    keys, values = empty.keys.new_empty(2, batch, heads, _CONTEXT + count, width).normal_()
    return AttentionState(keys, values, torch.full_like(empty.lengths, _CONTEXT), _CONTEXT)


def _mamba_ssm(model: LanguageModel, tokens: Tensor) -> Call:
    decoder = mamba_ssm.Decoder(mamba_ssm.language_model(model).eval(), *tokens.shape)
    vocabulary = model.config.vocab_size

    def call() -> tuple[Tensor, ...]:
        decoder.reset()
        for column in tokens.unbind(1):
            logits = decoder.step(column)
        return (logits[:, :vocabulary],)

    return call

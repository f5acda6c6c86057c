"""`longscan bench prefill`: a whole prompt through a language model, to the scores of its next token and a state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longscan import ops
from longscan.bench import floors
from longscan.bench.contest import DTYPES, Call, Contender, Settings, beside, compare, describe, floor
from longscan.bench.models import exact, make_model, products, random_tokens, shapes_of, weight_bytes
from longscan.bench.peers import huggingface, llama_cpp, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.models import LanguageModel, prefill

AXES = "layers,d_model,vocabulary,tokens"


def run(settings: Settings) -> Report:
    """The 130M model over 512 and 2,048 tokens, in seconds."""
    shapes = shapes_of(settings, AXES, (24, 768, 50277, 512), (24, 768, 50277, 2048))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32", "bfloat16"):
            rows += _measure(shape, dtype, settings)
    return Report(
        "prefill",
        "s",
        higher_is_better=False,
        rows=rows,
        settings={"device": settings.device, "axes": AXES, "shapes": shapes},
    )


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    layers, d_model, vocabulary, count = shape
    model = make_model(layers, d_model, vocabulary, DTYPES[dtype], settings.device, settings.seed)
    tokens = random_tokens(count, vocabulary, settings.seed)[None].to(settings.device)
    group = describe(shape, dtype)
    truth = _ours(exact(model), tokens, "reference")()
    contenders = [Contender("longscan", "ours", lambda: _ours(model, tokens, "auto"))]
    peers: dict[str, Callable[[], Call]] = {
        "reference": lambda: _ours(model, tokens, "reference"),
        "transformers": lambda: _transformers(model, tokens),
        "transformers+longscan": lambda: huggingface.accelerated(_transformers(model, tokens)),
        "mambapy": lambda: _mambapy(model, tokens),
        "llama.cpp": lambda: _llama_cpp(model, tokens),
        "mamba-ssm": lambda: _mamba_ssm(model, tokens),
    }
    asked = settings.peers_of(*peers, slow_on_gpu=("reference", "transformers"))
    contenders += [Contender(name, "peer", peers[name]) for name in asked]
    # Every weight once, and a residual stream that each layer reads and writes at least.
    moved = weight_bytes(model) + 2 * layers * count * d_model * DTYPES[dtype].itemsize
    rows = compare(group, contenders, truth, settings, dtype=DTYPES[dtype], to_value=float, moved=moved)
    timing = floors.matrix_products(products(model, count), DTYPES[dtype], settings.device)
    return beside(rows, [floor(group, "products", timing, float, "its matrix products alone")])


def _ours(model: LanguageModel, tokens: Tensor, backend: str) -> Call:
    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        with ops.backend(backend):
            # As generation does it.
            logits, _ = prefill(model, list(tokens), chunk=tokens.numel())
        return (logits,)

    return call


def _transformers(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = huggingface.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        return (huggingface.prefill(peer, tokens)[0][:, :vocabulary],)

    return call


def _mambapy(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = mambapy.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        return (mambapy.prefill(peer, tokens)[:, :vocabulary],)

    return call


def _llama_cpp(model: LanguageModel, tokens: Tensor) -> Call:
    if model.device.type != "cpu":
        raise ImportError("llama.cpp is compared on the CPU only")
    peer = llama_cpp.Model(model, context=tokens.shape[1], threads=torch.get_num_threads())
    row, vocabulary = tokens[0], model.config.vocab_size

    def call() -> tuple[Tensor, ...]:
        peer.reset()
        return (peer.decode(row)[:, :vocabulary],)

    return call


def _mamba_ssm(model: LanguageModel, tokens: Tensor) -> Call:
    peer, vocabulary = mamba_ssm.language_model(model).eval(), model.config.vocab_size

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        return (mamba_ssm.prefill(peer, tokens, max_length=tokens.shape[1] + 1)[0][:, :vocabulary],)

    return call

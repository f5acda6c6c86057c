"""`longscan bench families`: Transformers' kin of Mamba by themselves and on our operators, token by token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from longscan.bench import floors
from longscan.bench.contest import DTYPES, Call, Contender, Settings, beside, compare, describe, floor
from longscan.bench.models import random_tokens
from longscan.bench.peers import huggingface
from longscan.bench.report import Report, Row

AXES = "layers,d_model,vocabulary,batch,tokens"

#: Layers at which each has about what a 130M model reads for a token; Jamba's are a period of its pattern.
_LAYERS = {"falcon_mamba": 24, "jamba": 8, "zamba": 12}


def run(settings: Settings) -> Report:
    """Width 768 with the published proportions, 32 tokens one by one after the first, in tokens per second.

    Jamba has one attention layer in eight and 16 experts, of which a token passes 2, in every other layer; Zamba two
    heads of Mamba and a shared Transformer every six layers. Mamba itself is in `longscan bench decode`. Everyone is
    fed the same tokens; the last scores are compared with those of Transformers over the whole sequence at once, in
    float32.
    """
    rows: list[Row] = []
    shapes = {family: settings.shapes_of(AXES, (count, 768, 50280, 1, 32)) for family, count in _LAYERS.items()}
    for family, own in shapes.items():
        for shape in own:
            for dtype in settings.dtypes_of("float32", "bfloat16"):
                rows += _measure(family, shape, dtype, settings)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes}
    return Report("families", "tokens/s", higher_is_better=True, rows=rows, settings=about)


def _measure(family: str, shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    layers, d_model, vocabulary, batch, count = shape
    torch.manual_seed(settings.seed)
    model = huggingface.of_family(family, layers, d_model, vocabulary).to(settings.device, DTYPES[dtype])
    tokens = random_tokens(batch * (count + 1), vocabulary, settings.seed).view(batch, -1).to(settings.device)
    group = describe(shape, dtype, family=family)
    with torch.no_grad():
        truth = copy.deepcopy(model).float()(tokens, use_cache=False).logits[:, -1]

    def to_value(seconds: float) -> float:
        return batch * count / seconds

    call = _decode(model, tokens)
    contenders = [Contender("transformers+longscan", "ours", lambda: huggingface.accelerated(call, (family,)))]
    contenders += [Contender(name, "peer", lambda: call) for name in settings.peers_of("transformers")]
    moved = count * read_by_a_token(model, batch)
    rows = compare(group, contenders, (truth,), settings, dtype=DTYPES[dtype], to_value=to_value, moved=moved)
    bandwidth = floors.read_bandwidth(settings.device)
    note = "every weight that a token needs read once"
    return beside(rows, [floor(group, "memory", moved / bandwidth, to_value, note)])


def _decode(model: nn.Module, tokens: Tensor) -> Call:
    step = huggingface.stepper(model)

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        logits, state = step(tokens[:, :1], None)
        for column in tokens[:, 1:].split(1, dim=1):
            logits, state = step(column, state)
        return (logits[:, -1],)

    return call


def read_by_a_token(model: Any, batch: int) -> int:
    """Bytes of weights: of the embedding the head's share, of experts no more than the sequences can choose.

    Weights that several layers share count once, though they are read by each.
    """
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            size = size // parameter.shape[0] * min(parameter.shape[0], batch * model.config.num_experts_per_tok)
        if not tied and parameter is model.get_input_embeddings().weight:
            continue
        total += size
    return total

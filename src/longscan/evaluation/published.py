"""Zero-shot figures of the Mamba paper, to stand beside what is measured here."""

from __future__ import annotations

import re
from pathlib import PurePath

#: The tasks of the paper's table, by their names in the harness, with the metric that it prints.
ZERO_SHOT_METRICS = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}

_COLUMNS = (("lambada_openai", "perplexity"), *ZERO_SHOT_METRICS.items())

# Gu and Dao 2023 (arXiv 2312.00752), table 3: LAMBADA's perplexity, then accuracies in per cent.
_TABLE = {
    "mamba-130m": (16.07, 44.3, 35.3, 64.5, 48.0, 24.3, 51.9),
    "mamba-370m": (8.14, 55.6, 46.5, 69.5, 55.1, 28.0, 55.3),
    "mamba-790m": (6.02, 62.7, 55.1, 72.1, 61.2, 29.5, 56.1),
    "mamba-1.4b": (5.04, 64.9, 59.1, 74.2, 65.5, 32.8, 61.5),
    "mamba-2.8b": (4.23, 69.2, 66.1, 75.2, 69.7, 36.3, 63.5),
}


def published_zero_shot(model: str) -> dict[tuple[str, str], float]:
    """The paper's figures of a released model, by task and metric; empty for a model that it does not have.

    Args:
        model: a folder or a name on the Hugging Face Hub that ends in the model's name, such as
            ``state-spaces/mamba-130m`` or ``state-spaces/mamba-130m-hf``.
    """
    name = re.sub(r"-hf$", "", PurePath(model).name.lower())
    return dict(zip(_COLUMNS, _TABLE[name], strict=True)) if name in _TABLE else {}

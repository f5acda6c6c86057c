"""What training lowers, where it is not the task's loss as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.task import IGNORED

# Below it, softplus(x) and exp(x) are the same float32.
_TINY = -17.0


def log_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    r"""The logarithm of the mean cross-entropy in nats, at any size of it.

    With m the log-odds against the right class, a cross-entropy is softplus(m). Once m is below about -17 float32 has
    no digits left for it next to 1, and soon none for its gradient: a model that is right with so much certainty stops
    learning. The logarithm is about m itself, and its gradient that of the mean over the mean: of normal size, and made
    by the sequences that the model is least sure of.

    Args:
        scores: (..., classes).
        targets: (...) int64 classes; ``IGNORED`` ones do not count, one at least has to.

    Raises:
        ArgumentError: targets are values.
    """
    if targets.is_floating_point():
        raise ArgumentError("objective: log-loss is of classes, and these targets are values; lower the loss")
    targets, scores = targets.flatten(), scores.float().flatten(0, -2)
    asked = targets != IGNORED
    right = targets.where(asked, 0).unsqueeze(1)
    against = scores.scatter(1, right, -torch.inf).logsumexp(1) - scores.gather(1, right).squeeze(1)
    # Each branch gets an argument that it can take, else the gradient of the other is no number.
    logs = against.where(against < _TINY, F.softplus(against.clamp(min=_TINY)).log())
    count = asked.sum()
    return logs.where(asked, -torch.inf).logsumexp(0) - count.log()

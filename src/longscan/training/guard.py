"""Updates that are better left out: gradients that are no numbers, and spikes."""

from __future__ import annotations

import math

from longscan.errors import TrainingError

# How fast the usual norm follows, and how many updates it must have seen before a spike can be told from a start.
_KEEP, _SEEN = 0.98, 20
_MOST_IN_A_ROW = 10


class Guard:
    """Decides, by the norm of the gradient, which updates are made.

    The usual norm is a running mean over the updates that were made, so what decides is the run itself: a run that goes
    on from a checkpoint decides alike.

    Args:
        spike: leave out an update whose gradient is so many times larger than usual; 0: only what is no number.
    """

    def __init__(self, spike: float) -> None:
        self._spike = spike
        self._sum = 0.0
        self._weight = 0.0
        self._seen = 0
        self._row = 0

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether to make the update of a step with this loss and this norm of the gradient.

        Raises:
            TrainingError: none of the last ten was made.
        """
        usual = self._sum / self._weight if self._weight else math.inf
        spikes = bool(self._spike) and self._seen >= _SEEN and norm > self._spike * usual
        if math.isfinite(loss) and math.isfinite(norm) and not spikes:
            self._sum = _KEEP * self._sum + (1 - _KEEP) * norm
            self._weight = _KEEP * self._weight + (1 - _KEEP)
            self._seen += 1
            self._row = 0
            return True
        self._row += 1
        if self._row == _MOST_IN_A_ROW:
            raise TrainingError(
                f"{_MOST_IN_A_ROW} updates in a row were left out: the loss is {loss} and the gradient's norm {norm}, "
                f"usually {usual:.3g}; the checkpoints are from before. Lower the learning rate and go on from there"
            )
        return False

    def state(self) -> dict[str, float]:
        """What :meth:`load` takes back, exactly, also through JSON."""
        return {"sum": self._sum, "weight": self._weight, "seen": self._seen, "row": self._row}

    def load(self, state: dict[str, float]) -> None:
        self._sum, self._weight = float(state["sum"]), float(state["weight"])
        self._seen, self._row = int(state["seen"]), int(state["row"])

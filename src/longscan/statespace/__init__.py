"""The theory of linear state space models: where they start, and how continuous time becomes steps."""

from __future__ import annotations

from longscan.statespace.discretisation import discretise
from longscan.statespace.initialisation import diagonal, log_uniform_steps

__all__ = ["diagonal", "discretise", "log_uniform_steps"]

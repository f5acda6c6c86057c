"""The theory of linear state space models: where they start, and how continuous time becomes steps."""

from __future__ import annotations

from longscan.statespace.discretisation import discretise, discretise_dense
from longscan.statespace.hippo import transition
from longscan.statespace.initialisation import diagonal, log_uniform_steps
from longscan.statespace.nplr import NPLR, nplr

__all__ = ["NPLR", "diagonal", "discretise", "discretise_dense", "log_uniform_steps", "nplr", "transition"]

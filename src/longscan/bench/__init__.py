"""Speed, measured on this machine side by side with the peers that are installed, outputs compared first."""

from __future__ import annotations

from longscan.bench.contest import PEERS, Settings
from longscan.bench.report import Report, Row
from longscan.bench.timing import Timing, measure

__all__ = ["PEERS", "Report", "Row", "Settings", "Timing", "measure"]

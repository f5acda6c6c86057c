"""Published results as experiments: what to train and test, what the papers say, and what was measured here."""

from __future__ import annotations

from longscan.experiments.published import Published, beside, read_published
from longscan.experiments.report import results_page
from longscan.experiments.results import Result, read_results
from longscan.experiments.running import Run
from longscan.experiments.settings import SCALES, Settings, System, read_settings, scales_of

__all__ = [
    "SCALES",
    "Published",
    "Result",
    "Run",
    "Settings",
    "System",
    "beside",
    "read_published",
    "read_results",
    "read_settings",
    "results_page",
    "scales_of",
]

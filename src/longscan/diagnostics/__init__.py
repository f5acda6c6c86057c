"""What this machine is, and what of longscan works on it."""

from __future__ import annotations

from longscan.diagnostics.doctor import Check, check_backends, check_caches
from longscan.diagnostics.machine import command_line, commit, describe_machine, devices, usable_cores, versions

__all__ = [
    "Check",
    "check_backends",
    "check_caches",
    "command_line",
    "commit",
    "describe_machine",
    "devices",
    "usable_cores",
    "versions",
]

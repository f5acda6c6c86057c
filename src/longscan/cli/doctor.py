"""`longscan doctor`: which backend serves what here, and whether it works."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from longscan import diagnostics
from longscan.diagnostics import Check
from longscan.errors import ArgumentError

#: Environment variables that change which backend runs, or how.
VARIABLES = ("LONGSCAN_BACKEND", "LONGSCAN_CHECK", "TRITON_INTERPRET", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Options:
    """Say which backend serves which operator on this machine and why, and test each of them."""

    device: str | None = None
    """Look at this kind of device only: cpu, cuda, xpu or mps."""


def run(options: Options, console: Console | None = None) -> int:
    """Prints the report; returns 1 if a backend that should work does not, else 0."""
    console = console or Console()
    console.print(_facts())
    where = None
    if options.device is not None:
        where = [device for device in diagnostics.devices() if device.type == options.device]
        if not where:
            kinds = ", ".join(device.type for device in diagnostics.devices())
            raise ArgumentError(f"device: got {options.device!r}; here PyTorch has {kinds}")
    with console.status("testing each backend against the reference in float64"):
        checks = diagnostics.check_backends(where)
    console.print(_backends(checks))
    console.print(_caches())
    failed = [check for check in checks if check.failure is not None]
    if failed:
        names = ", ".join(f"{check.operator}/{check.backend} on {check.device}" for check in failed)
        console.print(f"[red]{len(failed)} of {len(checks)} do not work:[/red] {names}")
        return 1
    console.print(f"[green]Every backend that should work here does[/green] ({sum(_ran(c) for c in checks)} tested).")
    return 0


def _ran(check: Check) -> bool:
    return check.error is not None


def _facts() -> Table:
    machine = diagnostics.describe_machine()
    table = Table(title="This machine", show_header=False)
    memory = machine["memory"]
    table.add_row("system", machine["system"])
    table.add_row("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_features']}")
    table.add_row("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB")
    table.add_row("threads", f"{machine['threads']} (PyTorch's pool)")
    for i, name in enumerate(machine["gpus"]):
        capability = torch.cuda.get_device_capability(i)
        table.add_row(f"GPU {i}", f"{name}, compute capability {capability[0]}.{capability[1]}")
    found = diagnostics.versions()
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    table.add_row("commit", diagnostics.commit() or "not a checkout")
    table.add_row("set", ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "-")
    return table


def _backends(checks: list[Check]) -> Table:
    table = Table(title="Backends in the order that auto tries them; > is what it takes (a first run compiles)")
    for column in ("device", "operator", "", "backend", "result", "error", "seconds"):
        justify: JustifyMethod = "right" if column in ("error", "seconds") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    before = None
    for check in checks:
        group = (check.device, check.operator)
        if before is not None and group != before:
            table.add_section()
        shown = group if group != before else ("", "")
        before = group
        table.add_row(
            *shown,
            ">" if check.chosen else "",
            check.backend,
            _verdict(check),
            "" if check.error is None else f"{check.error:.0e}",
            "" if check.seconds is None else f"{check.seconds:.2f}",
        )
    return table


def _verdict(check: Check) -> str:
    if check.failure is not None:
        return f"[red]fails: {escape(check.failure)}[/red]"
    if check.reason is not None:
        return f"[yellow]not used: {escape(check.reason)}[/yellow]"
    return "[green]works[/green]"


def _caches() -> Table:
    table = Table(title="Where compiled kernels are kept")
    for column in ("cache", "folder", "writable", "moved by"):
        table.add_column(column, overflow="fold")
    for cache in diagnostics.check_caches():
        writable = "yes" if cache.writable else "[red]no: kernels are compiled again in every process[/red]"
        table.add_row(cache.name, str(cache.folder), writable, cache.variable)
    return table

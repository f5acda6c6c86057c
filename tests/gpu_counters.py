"""Reads the hardware counters of the selective scan's CUDA kernels with Nsight Compute and writes them to a JSON file.

    python tests/gpu_counters.py [--out results/gpu/counters.json]

What limits a kernel is the unit that is busiest. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.gpu_report import machine  # noqa: E402

#: Counters by the name they are written under. Shares are in per cent of what the unit can do while the kernel runs.
COUNTERS = {
    "microseconds": "gpu__time_duration.sum",
    "clock_mhz": "sm__cycles_elapsed.avg.per_second",
    "instructions": "smsp__inst_executed.sum",
    "issue_slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "special_functions": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "multiply_adds": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "integers": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "shared_memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "device_memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_of_a_scheduler": "smsp__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
}

SHAPES = ((8, 2048, 2048, 16), (1, 2048, 2048, 16))


def work() -> None:
    """What is measured: the forward pass alone, and both passes, of every shape."""
    import torch

    from longscan.bench.scan import make_inputs
    from longscan.ops import selective_scan

    for shape in SHAPES:
        inputs = make_inputs(shape, torch.bfloat16, "cuda", seed=0)
        with torch.no_grad():
            selective_scan(*inputs.values(), dt_softplus=True, backend="cuda")
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        y = selective_scan(*leaves, dt_softplus=True, backend="cuda")
        assert isinstance(y, torch.Tensor)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    torch.cuda.synchronize()


def read(page: str) -> list[dict[str, Any]]:
    """The kernels of ncu's raw page, a line each."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    table = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    units = next(table)
    kernels = []
    for line in table:
        kernel: dict[str, Any] = {"kernel": line["Kernel Name"].split("(")[0], "grid": line["Grid Size"]}
        for name, counter in COUNTERS.items():
            value = float(line[counter].replace(",", ""))
            scale = {"ns": 1e-3, "ms": 1e3, "Ghz": 1e3, "GHz": 1e3, "hz": 1e-6, "Hz": 1e-6}.get(units[counter], 1.0)
            kernel[name] = round(value * scale, 3)
        kernels.append(kernel)
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu" / "counters.json")
    parser.add_argument("--work", action="store_true", help="only run what is measured")
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    metrics = ",".join(COUNTERS.values())
    page = ["--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", "regex:^scan_", "--metrics", metrics]
    run = subprocess.run([ncu, *page, sys.executable, __file__, "--work"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"ncu failed: {run.stdout[-3000:]}{run.stderr[-3000:]}")
    report = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "work": [list(shape) for shape in SHAPES],
        "counters": COUNTERS,
        "kernels": read(run.stdout),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for kernel in report["kernels"]:
        sys.stdout.write(f"{kernel}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

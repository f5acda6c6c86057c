"""The facts that belong beside every measured figure: machine, versions, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

#: Distributions whose versions decide how fast or how right a result is.
PACKAGES = (
    "longscan",
    "torch",
    "numpy",
    "numba",
    "triton",
    "safetensors",
    "transformers",
    "mambapy",
    "mamba-ssm",
    "causal-conv1d",
    "llama-cpp-python",
    "tokenizers",
    "datasets",
)


def describe_machine() -> dict[str, Any]:
    """CPU model, vector features, usable cores, threads, memory (bytes), GPUs and operating system."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": physical_memory(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """The processor's own name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def devices() -> list[torch.device]:
    """Every device PyTorch can use here, one of each kind, the CPU first."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append(torch.device("xpu"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def versions() -> dict[str, str]:
    """Versions of Python, and of those of `PACKAGES` that are installed."""
    found = {
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.version.hip is not None:
        found["hip"] = torch.version.hip
    # The module knows its build ("+cpu"), which the distribution's metadata may not.
    found["torch"] = torch.__version__
    return found


def command_line() -> str:
    """The command that runs, as one would type it."""
    # `python -m longscan` is the same command.
    name = "longscan" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name
    return " ".join([name or "python", *sys.argv[1:]])


def commit() -> str | None:
    """The git commit of the source that runs, "+" appended when files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        # An installed copy may lie inside another project's checkout.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

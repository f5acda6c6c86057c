from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from longscan import diagnostics
from longscan.cli import doctor as command
from longscan.diagnostics import doctor
from longscan.errors import ArgumentError
from longscan.ops import backends

CPU = [torch.device("cpu")]


def test_every_backend_is_reported_and_none_fails() -> None:
    checks = diagnostics.check_backends(CPU)
    assert [(c.operator, c.backend) for c in checks] == [
        (operator, name) for operator, names in backends.OPERATORS.items() for name in names
    ]
    assert [check for check in checks if check.failure is not None] == []
    for operator in backends.OPERATORS:
        own = [check for check in checks if check.operator == operator]
        assert sum(check.chosen for check in own) == 1
        for check in own:
            # Each has either been tried or says why not.
            assert (check.reason is None) == (check.error is not None)
        assert own[-1].backend == "reference"
        assert own[-1].reason is None


def test_every_operator_has_a_probe() -> None:
    assert doctor._PROBES.keys() == backends.OPERATORS.keys()


def wrong_module(name: str, error: Exception | None) -> ModuleType:
    """The reference under another name, whose output is wrong, or which raises."""
    reference: Any = backends.load("causal_conv1d", "reference")
    module: Any = ModuleType(name)
    module.__dict__.update(reference.__dict__)

    def forward(*arguments: Any, **options: Any) -> Any:
        if error is not None:
            raise error
        y, final = reference.forward(*arguments, **options)
        return y * 1.001, final

    module.forward = forward
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "words"),
    [(None, "is off by"), (RuntimeError("kernel lost"), "RuntimeError: kernel lost")],
)
def test_a_backend_that_should_work_and_does_not_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, words: str
) -> None:
    load = backends.load
    wrong = wrong_module("longscan.ops.causal_conv1d.cpu", error)

    def loads(operator: str, name: str) -> ModuleType | str:
        return wrong if (operator, name) == ("causal_conv1d", "cpu") else load(operator, name)

    monkeypatch.setattr(backends, "load", loads)
    failed = [check for check in diagnostics.check_backends(CPU) if check.failure is not None]
    assert [(check.operator, check.backend) for check in failed] == [("causal_conv1d", "cpu")]
    assert words in str(failed[0].failure)
    console = Console(record=True, width=160)
    assert command.run(command.Options(device="cpu"), console) == 1
    assert "causal_conv1d/cpu on cpu" in console.export_text()


def test_command_reports_and_succeeds() -> None:
    console = Console(record=True, width=160)
    assert command.run(command.Options(device="cpu"), console) == 0
    text = console.export_text()
    for word in ("versions", "reference", "selective_scan", "NUMBA_CACHE_DIR", torch.__version__):
        assert word in text


def test_unknown_device_is_named() -> None:
    with pytest.raises(ArgumentError, match="'tape'"):
        command.run(command.Options(device="tape"), Console(quiet=True))


def test_cache_folders_follow_their_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("LONGSCAN_CUDA_CACHE_DIR", str(tmp_path / "cuda"))
    numba, triton, cuda = diagnostics.check_caches()
    assert (numba.folder, numba.writable) == (tmp_path / "not" / "yet", True)
    assert triton.folder == tmp_path
    assert cuda.folder == tmp_path / "cuda"


def test_machine_and_versions() -> None:
    machine = diagnostics.describe_machine()
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert diagnostics.versions()["torch"] == torch.__version__

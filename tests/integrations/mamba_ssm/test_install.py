"""The names: found, complete, honest about what is missing, and gone without a trace."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm import disable, enable, install
from longscan.integrations.mamba_ssm.names import MODULES, VERSIONS


def ours(name: str) -> bool:
    return name.partition(".")[0] in VERSIONS


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine that has neither package; afterwards the import system must be as it was."""
    for name in [name for name in sys.modules if ours(name)]:
        monkeypatch.delitem(sys.modules, name)
    finders = list(sys.meta_path)
    yield
    disable()
    assert sys.meta_path == finders
    assert not [name for name in sys.modules if ours(name) and "longscan" in repr(sys.modules[name])]
    # What a test put there as a real installation.
    for name in [name for name in sys.modules if ours(name)]:
        del sys.modules[name]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_installed", lambda name: False)


@pytest.mark.usefixtures("absent")
def test_every_name_is_there() -> None:
    assert enable().names == ("mamba_ssm", "causal_conv1d")
    for name, contents in MODULES.items():
        module = importlib.import_module(name)
        assert importlib.util.find_spec(name) is module.__spec__
        assert module.__spec__ is not None
        assert (module.__spec__.name, module.__name__, module.__package__) == (name, name, name)
        for public, source in contents.items():
            assert getattr(module, public) is getattr(importlib.import_module(source), public)
            assert (public in module.__all__) == (not public.startswith("_"))
    for name, version in VERSIONS.items():
        assert importlib.import_module(name).__version__ == version


@pytest.mark.usefixtures("absent")
def test_lines_that_people_write() -> None:
    session: dict[str, object] = {}
    with enable():
        exec(
            "from mamba_ssm import Mamba, MambaLMHeadModel\n"
            "from mamba_ssm.ops.triton import selective_state_update as module\n"
            "from mamba_ssm.ops.triton.selective_state_update import selective_state_update\n"
            "from mamba_ssm.models.mixer_seq_simple import MixerModel, create_block, _init_weights\n"
            "from mamba_ssm.modules.mamba_simple import *\n"
            "import mamba_ssm, causal_conv1d\n"
            "scan = mamba_ssm.ops.selective_scan_interface.selective_scan_fn\n"
            "states = causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states\n",
            session,
        )
    assert callable(session["scan"])
    assert not callable(session["module"])


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    ("line", "missing", "parent"),
    [
        ("from mamba_ssm import Mamba2", "Mamba2", "mamba_ssm"),
        ("import mamba_ssm.modules.mamba2", "mamba2", "mamba_ssm.modules"),
        ("from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined", "ssd_combined",
         "mamba_ssm.ops.triton"),
        ("from mamba_ssm.ops.selective_scan_interface import rms_norm_forward", "rms_norm_forward",
         "mamba_ssm.ops.selective_scan_interface"),
        ("from causal_conv1d.cpp_functions import nothing", "nothing", "causal_conv1d.cpp_functions"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_words(line: str, missing: str, parent: str) -> None:
    enable()
    with pytest.raises(
        ImportError, match=rf"longscan stands in for \w+ here and has no '{missing}' in {parent}; it has"
    ):
        exec(line, {})
    assert not hasattr(importlib.import_module("mamba_ssm"), "Mamba2")


@pytest.mark.usefixtures("absent")
def test_nothing_stays_behind() -> None:
    before = dict(sys.modules)
    with enable() as enabled:
        importlib.import_module("mamba_ssm")
        assert "mamba_ssm" in repr(enabled)
    after = {name: module for name, module in sys.modules.items() if not name.startswith("longscan.")}
    assert after.items() <= before.items()
    assert importlib.util.find_spec("mamba_ssm") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm'"):
        importlib.import_module("mamba_ssm")


@pytest.mark.usefixtures("absent")
def test_enabling_twice_and_leaving_in_any_order() -> None:
    first, second = enable(), enable()
    assert second.names == ()
    with second:
        importlib.import_module("mamba_ssm")
    assert importlib.util.find_spec("mamba_ssm") is not None
    with first:
        pass
    assert importlib.util.find_spec("mamba_ssm") is None
    with first:
        pass
    disable()


def test_a_real_installation_is_hidden_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mamba_ssm"
    folder.mkdir()
    (folder / "__init__.py").write_text("__version__ = 'real'\nfrom mamba_ssm import inner\n")
    (folder / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    assert "mamba_ssm" not in enable().names
    real = importlib.import_module("mamba_ssm")
    assert real.__version__ == "real"
    kept = {name: module for name, module in sys.modules.items() if ours(name) and "longscan" not in repr(module)}
    with enable(replace=True) as enabled:
        assert "mamba_ssm" in enabled.names
        assert importlib.import_module("mamba_ssm") is not real
        with pytest.raises(ImportError, match="has no 'inner'"):
            importlib.import_module("mamba_ssm.inner")
    assert importlib.import_module("mamba_ssm") is real
    assert all(sys.modules[name] is module for name, module in kept.items())
    assert set(kept) == {"mamba_ssm", "mamba_ssm.inner"}


@pytest.mark.usefixtures("absent")
def test_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, found in (("", False), ("0", False), ("1", True), ("replace", True)):
        monkeypatch.setenv(install.VARIABLE, value)
        install.enable_from_environment()
        assert (importlib.util.find_spec("mamba_ssm") is not None) == found
        disable()
    monkeypatch.setenv(install.VARIABLE, "yes")
    with pytest.raises(ArgumentError, match="got 'yes', allowed are 1, replace and 0"):
        install.enable_from_environment()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != install.VARIABLE}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env={**inherited, **environment}
    )


def test_a_fresh_process_with_the_variable_set() -> None:
    """`import longscan` serves the names, and does not import what stands behind them."""
    code = (
        "import longscan, sys\n"
        "assert 'longscan.integrations.mamba_ssm.module' not in sys.modules and 'torch' not in sys.modules\n"
        "import mamba_ssm, longscan.integrations.mamba_ssm as names\n"
        "names.disable()\n"
        "print(mamba_ssm.Mamba(8).d_inner, [name for name in sys.modules if name.startswith('mamba_ssm')])"
    )
    done = run("-c", code, LONGSCAN_MAMBA_SSM="replace")
    assert done.stdout == "16 []\n", done.stderr


def test_a_program_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("from causal_conv1d import causal_conv1d_fn\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, beside, torch\nfrom mamba_ssm import Mamba\n"
        "print(__name__, sys.argv[1:], Mamba(8)(torch.zeros(1, 3, 8)).shape)\n"
    )
    done = run("-m", "longscan.integrations.mamba_ssm", str(program), "a", "-b", LONGSCAN_MAMBA_SSM="replace")
    assert done.stdout == "__main__ ['a', '-b'] torch.Size([1, 3, 8])\n", done.stderr
    usage = run("-m", "longscan.integrations.mamba_ssm")
    assert usage.returncode == 1
    assert "program.py arguments" in usage.stderr

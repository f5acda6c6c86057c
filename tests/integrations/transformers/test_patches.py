"""enable() and disable(): exact, idempotent, nested, and refused in words where Transformers is not as expected."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import longscan.integrations.transformers as hf
from longscan.errors import ArgumentError, IntegrationError
from longscan.integrations.transformers.patches import PATCHES

transformers = pytest.importorskip("transformers")


def _methods() -> dict[str, Any]:
    owners = {patch.owner: getattr(importlib.import_module(patch.module), patch.owner) for patch in PATCHES}
    return {f"{patch.owner}.{patch.name}": owners[patch.owner].__dict__[patch.name] for patch in PATCHES}


def test_disable_gives_the_very_same_methods_back() -> None:
    before = _methods()
    hf.enable()
    during = _methods()
    assert all(during[name] is not before[name] for name in before)
    hf.enable()
    assert _methods() == during
    assert hf.enabled() == hf.FAMILIES
    hf.disable()
    assert _methods() == before
    assert hf.enabled() == ()
    hf.disable()


def test_contexts_nest() -> None:
    with hf.enable(("mamba",)):
        assert hf.enabled() == ("mamba",)
        with hf.enable(("jamba", "mamba")):
            assert hf.enabled() == ("mamba", "jamba")
        assert hf.enabled() == ("mamba",)
        with pytest.raises(KeyError), hf.enable():
            raise KeyError
        assert hf.enabled() == ("mamba",)
    assert hf.enabled() == ()


def test_names_and_signatures_stay() -> None:
    before = {name: inspect.signature(method) for name, method in _methods().items()}
    with hf.enable():
        assert {name: inspect.signature(method) for name, method in _methods().items()} == before
        assert all(method.__name__ == "forward" for method in _methods().values())


def _with_another_argument(self: Any, hidden_states: Any, sequence_ids: Any, cache_params: Any = None) -> None: ...


def _with_other_parts(self: Any, hidden_states: Any, cache_params: Any = None, attention_mask: Any = None) -> Any:
    return self.in_proj(hidden_states), self.conv1d, self.fused_selection


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (_with_another_argument, "takes .*'sequence_ids'"),
        (_with_other_parts, "does not speak of .*x_proj"),
        (None, "is not there"),
    ],
)
def test_another_version_is_refused_and_nothing_replaced(
    method: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.zamba import modeling_zamba

    if method is None:
        monkeypatch.delattr(modeling_zamba, "ZambaMambaMixer")
    else:
        monkeypatch.setattr(modeling_zamba.ZambaMambaMixer, "forward", method)
    with pytest.raises(IntegrationError, match=f"(?s)transformers .*ZambaMambaMixer.*{words}"):
        hf.enable()
    assert hf.enabled() == ()
    # The others can be had.
    with hf.enable(("mamba", "falcon_mamba", "jamba")):
        pass


def test_someone_elses_replacement_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba.modeling_mamba import MambaMixer, MambaModel

    before = _methods()

    def stranger(self: Any) -> None: ...

    # At its end the test's own patch is undone to what was there before.
    monkeypatch.setattr(MambaMixer, "forward", MambaMixer.forward)
    hf.enable(("mamba",))
    MambaMixer.forward = stranger
    with pytest.raises(IntegrationError, match=r"MambaMixer\.forward: replaced by somebody else"):
        hf.disable()
    assert MambaMixer.forward is stranger
    assert MambaModel.forward is before["MambaModel.forward"]
    assert hf.enabled() == ()
    monkeypatch.undo()
    assert _methods() == before


def test_no_family_is_forgotten() -> None:
    """Whatever scans as Mamba-1 does in the Transformers that is installed."""
    models = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name for path in models.glob("*/modeling_*.py") if "selective_scan_fn" in path.read_text("utf-8")
    }
    assert found == set(hf.FAMILIES)


def test_unknown_families() -> None:
    with pytest.raises(ArgumentError, match="families: got 'mamba2'; allowed are mamba, falcon_mamba, jamba, zamba"):
        hf.enable(("mamba", "mamba2"))


# What a program sees of it.
_LOOK = (
    "import sys\n"
    "import longscan.integrations.transformers as hf\n"
    "print(hf.enabled(), 'transformers' in sys.modules)\n"
    "if hf.enabled():\n"
    "    import transformers\n"
    "    print(type(transformers.AutoConfig.for_model('longscan')).__name__)\n"
)


def _run(*arguments: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "LONGSCAN_TRANSFORMERS"}
    done = subprocess.run(
        [sys.executable, *arguments], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import longscan` does what the variable says; without it Transformers is not even imported."""
    assert _run("-c", _LOOK, LONGSCAN_TRANSFORMERS="0") == "() False\n"
    enabled = f"{hf.FAMILIES} True\nLongscanConfig\n"
    assert _run("-c", "import longscan\n" + _LOOK, LONGSCAN_TRANSFORMERS="1") == enabled
    monkeypatch.setenv("LONGSCAN_TRANSFORMERS", "yes")
    with pytest.raises(ArgumentError, match="LONGSCAN_TRANSFORMERS: got 'yes', allowed are 1 and 0"):
        hf.enable_from_environment()


def test_a_program_runs_unchanged(tmp_path: Path) -> None:
    """One that says nothing of longscan, with its own name and arguments."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from transformers import AutoConfig\n"
        "families = sys.modules['longscan.integrations.transformers'].enabled()\n"
        "print(__name__, sys.argv[1:], AutoConfig.for_model('longscan').model_type, *families)\n"
    )
    found = _run("-m", "longscan.integrations.transformers", str(program), "a", "-b")
    assert found == f"__main__ ['a', '-b'] longscan {' '.join(hf.FAMILIES)}\n"

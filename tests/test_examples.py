"""Every example runs, at a tiny setting, and shows what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"

#: Arguments of a short run, and what the output must say.
EXAMPLES = {
    "layer.py": (["--steps", "3", "--length", "64"], r"step 3: loss \d"),
    "stream.py": (["--tokens", "5000", "--chunk", "512"], r"5,000 tokens: state 77,824 bytes"),
    "truncated_bptt.py": (["--chunks", "4"], r"state reset.*\n.*state carried: square error \d"),
    "packed.py": (["--sequences", "8", "--longest", "60"], r"differ by \d\.\de-0[6-9]"),
    "hybrid.py": (["--steps", "3"], r"hybrid: \d+ % recalled"),
    "lora.py": (["--steps", "3"], r"the first weights are untouched: True"),
}


def test_none_is_forgotten() -> None:
    scripts = sorted(FOLDER.glob("*.py"))
    assert [path.name for path in scripts] == sorted(EXAMPLES)
    readme = (FOLDER.parent / "README.md").read_text()
    for path in scripts:
        assert f"examples/{path.name}" in readme
        assert len(path.read_text().splitlines()) < 60, path.name


@pytest.mark.parametrize("name", EXAMPLES)
def test_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, says = EXAMPLES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert re.search(says, capsys.readouterr().out)

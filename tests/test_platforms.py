"""On systems that lack packages of this one: everything runs by the definitions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from longscan.ops import backends

#: What macOS or Windows may not have: compilers of kernels, and a module of Unix.
LACKING = ("numba", "llvmlite", "triton", "cuda", "fcntl")

HIDDEN = """
import importlib.machinery as machinery

find = machinery.PathFinder.find_spec
def found(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {} else find(name, path, target)
machinery.PathFinder.find_spec = classmethod(found)
"""

PROGRAM = f"""
{HIDDEN.format(LACKING)}
import torch
from longscan import LanguageModel, LanguageModelConfig, diagnostics

model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=3, vocab_size=7, mixer=("mamba", "s4d", "attention")))
tokens = torch.arange(12).view(2, 6) % 7
model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
assert all(parameter.grad is not None for parameter in model.parameters())
mamba = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=7))
for some in (model, mamba, mamba.quantize()):
    assert len(some.generate([[1, 2, 3], [4]], 4).tokens[1]) == 4
checks = diagnostics.check_backends([torch.device("cpu")])
assert [check for check in checks if check.failure] == []
for check in checks:
    if check.backend == "cpu":
        assert "numba cannot be imported" in check.reason, check
"""


def test_without_compilers_the_definitions_serve() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("from longscan.integrations.transformers import LongscanForCausalLM", "transformers"),
        ("from longscan.integrations.lm_eval import LongscanLM", "lm-eval"),
    ],
)
def test_without_a_package_its_extra_is_named(line: str, extra: str) -> None:
    hidden = HIDDEN.format(("transformers", "lm_eval", "tqdm"))
    run = subprocess.run([sys.executable, "-c", hidden + line], capture_output=True, text=True, timeout=120)
    assert f"longscan[{extra}]" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_a_device_without_kernels_is_served_in_plain_pytorch(operator: str) -> None:
    *fast, last = backends.OPERATORS[operator]
    for name in {"cpu", "cuda", "triton"} & set(fast):
        assert "the tensors are on mps" in (backends.refusal(operator, name, torch.device("mps"), []) or "")
    assert last == "reference"
    assert backends.refusal(operator, last, torch.device("mps"), []) is None

"""Transformers finds the names, and its Mamba gives the same numbers with them as with its own plain PyTorch."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from longscan.integrations.mamba_ssm import conv, disable, enable, scan, step
from longscan.ops.causal_conv1d import cpu as conv_cpu
from longscan.ops.selective_scan import cpu as scan_cpu
from tests.integrations.mamba_ssm.test_scan import Seen

pytest.importorskip("transformers")

MODELS = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}
FUNCTIONS = {
    "causal_conv1d_fn": conv,
    "causal_conv1d_update": conv,
    "mamba_inner_fn": scan,
    "selective_scan_fn": scan,
    "selective_state_update": step,
}


def modeling(kind: str) -> ModuleType:
    """Transformers' modeling file, executed anew: it looks for fast functions when it is imported."""
    name = f"transformers.models.{kind}.modeling_{kind}"
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of our functions that were called, in turn."""
    called: list[str] = []

    def spied(name: str, original: Any) -> Any:
        def spy(*arguments: Any, **named: Any) -> Any:
            called.append(name)
            return original(*arguments, **named)

        # Transformers passes on only what a function's signature names.
        spy.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return spy

    for name, module in FUNCTIONS.items():
        monkeypatch.setattr(module, name, spied(name, getattr(module, name)))
    yield called
    disable()
    for kind in MODELS:
        sys.modules.pop(f"transformers.models.{kind}.modeling_{kind}", None)


def models(kind: str) -> tuple[Any, Any]:
    """One model with its own plain PyTorch, one with the names served."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        kind, hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4, time_step_rank=3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = getattr(modeling(kind), MODELS[kind])(config)
    with enable(replace=True):
        fast = getattr(modeling(kind), MODELS[kind])(config)
    fast.load_state_dict(plain.state_dict())
    return plain.eval(), fast.eval()


IDS = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MODELS)
def test_prefill_and_decoding(kind: str, calls: list[str]) -> None:
    plain, fast = models(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(IDS, use_cache=False).logits, plain(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5
        )
        assert set(calls) == {"causal_conv1d_fn", "selective_scan_fn"}
        expected = plain.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(fast.generate(IDS, max_new_tokens=6, do_sample=False), expected)
    assert set(calls) == set(FUNCTIONS) - {"mamba_inner_fn"}


def test_training(calls: list[str]) -> None:
    plain, fast = models("mamba")
    for model in (plain, fast):
        model.train()
        model(IDS, labels=IDS).loss.backward()
    assert calls == ["mamba_inner_fn"] * 2
    for (name, got), (_, expected) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_activations_are_not_copied_on_the_way(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = models("mamba")
    convs, scans = Seen(monkeypatch, conv_cpu, "forward"), Seen(monkeypatch, scan_cpu, "forward")
    given: list[int] = []
    for layer in fast.backbone.layers:
        layer.mixer.in_proj.register_forward_hook(lambda _, __, out: given.append(out.data_ptr()))
    inner = fast.config.intermediate_size
    for training in (False, True):
        with torch.no_grad():
            fast.train(training)(IDS, use_cache=False)
    assert len(given) == 4
    for address, conv_call, scan_call in zip(given, convs.calls, scans.calls, strict=True):
        assert conv_call[0] is not None
        assert scan_call[6] is not None
        assert conv_call[0][0] == address
        assert scan_call[6][0] == address + 4 * inner
        # What the convolution gave goes to the scan as it is.
        assert scan_call[0] is not None
        assert scan_call[0][1] == (11 * inner, inner, 1)


def test_versions_without_a_distribution() -> None:
    from importlib.metadata import PackageNotFoundError, version

    from transformers.utils.import_utils import _is_package_available

    with enable(replace=True):
        assert _is_package_available("mamba_ssm")[0]
        try:
            expected = version("mamba_ssm")
        except PackageNotFoundError:
            # There is no distribution to ask; the module is.
            expected = "1.2.2+longscan"
        assert _is_package_available("mamba_ssm", return_version=True) == (True, expected)

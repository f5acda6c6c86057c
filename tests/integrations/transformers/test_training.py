"""Trainer, and adapters of PEFT around every projection of our mixers and of theirs: none is silently left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.integrations.transformers import enable
from longscan.mixers import Mamba
from longscan.models import LanguageModel
from longscan.models.decoding import CompiledStepper, ModuleStepper, make_stepper
from tests.integrations.transformers import theirs
from tests.models.small import make

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
hf = pytest.importorskip("longscan.integrations.transformers")

TOKENS = torch.tensor([[1, 2, 3, 4, 12, 5, 7], [9, 8, 7, 6, 5, 4, 3]])
TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj")
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def adapted(model: Any, *targets: str) -> Any:
    """With LoRA whose two factors are both not zero."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{}, {"selection_norm_eps": 1e-6}, {"a_init": "s4d-lin", "d_state": 4}])
def test_an_adapter_acts_wherever_it_is(target: str, options: dict[str, Any]) -> None:
    """As its merged weights do: in a pass, step by step, and in gradients."""
    model = hf.LongscanForCausalLM.from_longscan(make(mixer_options=options)).eval()
    before = model(TOKENS).logits
    wrapped = adapted(copy.deepcopy(model), target)
    output = wrapped(TOKENS, labels=TOKENS)
    assert (output.logits - before).abs().max() > 1e-2
    output.loss.backward()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    with torch.no_grad():
        cache = wrapped(TOKENS[:, :3], use_cache=True).past_key_values
        steps = [wrapped(TOKENS[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(3, 7)]
    torch.testing.assert_close(torch.cat(steps, 1), output.logits[:, 3:], **EXACT)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, output.logits, **EXACT)


def test_generation_of_ours_with_an_adapter() -> None:
    """The compiled step does not read past it."""
    model = make().eval()
    assert isinstance(make_stepper(model), CompiledStepper)
    adapted(hf.LongscanForCausalLM.from_longscan(model), *TARGETS)
    assert isinstance(make_stepper(model), ModuleStepper)
    tokens = TOKENS[0].tolist()
    for _ in range(5):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert model.generate(TOKENS[0], 5, temperature=0).tokens[0] == tokens[7:]


def test_an_adapter_in_half_precision() -> None:
    """The bias of dt stays float32 beside weights and adapters in bfloat16."""
    exact = adapted(hf.LongscanForCausalLM.from_longscan(make().eval()), "dt_proj")(TOKENS).logits
    half = adapted(hf.LongscanForCausalLM.from_longscan(make().eval()).to(torch.bfloat16), "dt_proj")
    assert half.base_model.model.backbone.blocks[0].mixer.dt_proj.bias.dtype == torch.float32
    assert (half(TOKENS).logits - exact).norm() < 0.05 * exact.norm()


def test_an_adapter_that_would_be_left_out_is_refused() -> None:
    mixer = Mamba(8)
    mixer.conv1d = torch.nn.Sequential(mixer.conv1d)
    with pytest.raises(ArgumentError, match=r"conv1d is a Sequential, expected nn\.Conv1d"):
        mixer(torch.randn(1, 3, 8))
    model = theirs.make("mamba")
    model.backbone.layers[0].mixer.conv1d = torch.nn.Sequential(model.backbone.layers[0].mixer.conv1d)
    model.backbone.layers[0].mixer.conv1d.requires_grad_(False)
    with enable(), pytest.raises(ArgumentError, match=r"conv1d is a Sequential, expected nn\.Conv1d"):
        model(TOKENS)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
# Around out_proj of theirs PEFT itself refuses adapters.
@pytest.mark.parametrize("target", ["in_proj", "x_proj", "dt_proj"])
def test_adapters_around_theirs(family: str, target: str) -> None:
    """Of dt_proj their own code reads the weight alone, so that an adapter there does nothing; under ours it acts."""
    model = theirs.make(family)
    bare = model(TOKENS).logits
    wrapped = adapted(copy.deepcopy(model), target)
    plain = wrapped(TOKENS).logits
    assert ((plain - bare).abs().max() < 1e-5) == (target == "dt_proj")
    with enable():
        ours = wrapped(TOKENS).logits
        generated = wrapped.generate(TOKENS, max_new_tokens=3, do_sample=False)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(ours, merged(TOKENS).logits, **EXACT)
    assert torch.equal(generated, merged.generate(TOKENS, max_new_tokens=3, do_sample=False))


ROWS = [{"input_ids": row, "labels": row, "attention_mask": [1] * 7} for row in TOKENS.tolist()]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    transformers.logging.set_verbosity_error()
    plain: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 2e-2,
        "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**plain, **options})
    return transformers.Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)


@pytest.mark.parametrize("family", ["ours", "mamba"])
def test_trainer(family: str, tmp_path: Path) -> None:
    """A model learns a sequence by heart, is saved, and loads as what it was."""
    hf.register()
    model = hf.LongscanForCausalLM.from_longscan(make()) if family == "ours" else theirs.make("mamba")
    with enable():
        trains = trainer(model, tmp_path)
        trains.train()
        losses = [entry["loss"] for entry in trains.state.log_history if "loss" in entry]
        assert losses[-1] < 0.5 * losses[0]
        trains.save_model(str(tmp_path / "saved"))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    if family == "ours":
        torch.testing.assert_close(LanguageModel.from_pretrained(tmp_path / "saved")(TOKENS)[0], loaded(TOKENS).logits)


def test_a_trainer_goes_on_and_evaluates(tmp_path: Path) -> None:
    """As if it had never stopped, with gradient checkpointing or without; and what it measures is the model's loss."""
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(hf.LongscanForCausalLM.from_longscan(make()), tmp_path, **options)
    whole.train()
    resumed = trainer(
        hf.LongscanForCausalLM.from_longscan(make()), tmp_path, **options, gradient_checkpointing=True
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    loss = whole.model(TOKENS, labels=TOKENS).loss.item()
    assert whole.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("kind", ["mamba", "mixed"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])], ids=["whole", "padded"])
def test_gradient_checkpointing(kind: str, mask: torch.Tensor | None) -> None:
    """The same loss and gradients, with no layer's inner results kept; an adapter's too, in a model that is frozen."""

    def train(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(TOKENS, attention_mask=mask, labels=TOKENS).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return loss, list(torch.autograd.grad(loss, trained)), sum(kept)

    for model in (hf.LongscanForCausalLM.from_longscan(make(kind)), adapted(
        hf.LongscanForCausalLM.from_longscan(make(kind)), "in_proj" if kind == "mamba" else "fc1"
    )):  # fmt: skip
        loss, expected, kept = train(model.train())
        model.gradient_checkpointing_enable()
        again, found, least = train(model)
        assert torch.equal(again, loss)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        assert least < 0.5 * kept
        model.gradient_checkpointing_disable()
        assert train(model)[2] > least


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = hf.LongscanForCausalLM.from_longscan(make().eval())
    wrapped = adapted(copy.deepcopy(model), *TARGETS)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, wrapped(TOKENS).logits)

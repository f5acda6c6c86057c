"""Language modelling as a task: windows, what is held out, and bits per byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from longscan.errors import DataError
from longscan.evaluation.held_out import nats_by_position
from longscan.evaluation.tasks import evaluate_task
from longscan.plots.scaling import by_position
from longscan.tasks.language import Language
from longscan.tasks.task import Recipe
from longscan.training.tasks import TaskTrainer, task_model

CPU = torch.device("cpu")
WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(WORDS[i * k % 4] for k in range(1, 60 + i)))
    return str(folder)


def language(text: str, **options: object) -> Language:
    return Language(**{"length": 32, "data": text, "fraction": 0.3, **options})  # type: ignore[arg-type]


def test_windows_are_of_the_training_part_and_targets_follow(text: str) -> None:
    task = language(text)
    train, _ = task.tokens(CPU)
    inputs, targets = task.sample(6, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (6, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    stream = bytes(train)
    for row, target in zip(inputs, targets, strict=True):
        assert bytes([*row.tolist(), int(target[-1])]) in stream
    assert task.sample(2, torch.Generator(), length=7)[0].shape == (2, 7)


def test_contexts_are_the_fronts_of_the_same_windows(text: str) -> None:
    task = language(text)
    _, held_out = task.tokens(CPU)
    whole = torch.cat([inputs for inputs, _ in task.tests(32, 1, 5, CPU, 0)])
    assert bytes(whole.flatten().tolist()) == bytes(held_out[: whole.numel()])
    assert 1 <= len(held_out) - whole.numel() <= 32
    assert task.held_out == len(whole)
    front = torch.cat([inputs for inputs, _ in task.tests(8, 1, 5, CPU, 0)])
    assert torch.equal(front, whole[:, :8])
    longer = torch.cat([inputs for inputs, _ in task.tests(64, 1, 5, CPU, 0)])
    assert bytes(longer.flatten().tolist()) == bytes(held_out[: longer.numel()])


def test_figures_are_those_of_the_held_out_evaluation(text: str) -> None:
    task = language(text)
    model = task_model(task, "mamba", Recipe(d_model=16, n_layer=1), seed=0, device=CPU)
    _, held_out = task.tokens(CPU)
    windows = torch.cat([inputs for inputs, _ in task.tests(32, 1, 8, CPU, 0)]).numel()
    nats = nats_by_position(model, held_out[: windows + 1].numpy(), windows=10_000, length=32)  # type: ignore[arg-type]
    bits = nats / math.log(2) / task.bytes_per_token
    figures = {str(n): evaluate_task(model, task, length=n) for n in (4, 16, 32)}
    assert figures["32"] == pytest.approx(bits.mean().item(), rel=1e-5)
    found = by_position(figures, 32)
    assert [place for place, _ in found] == [2, 8, 512**0.5]
    expected = [bits[:4].mean(), bits[4:16].mean(), bits[16:].mean()]
    assert [figure for _, figure in found] == pytest.approx([value.item() for value in expected], rel=1e-5)
    rounded = evaluate_task(model, task, length=32, precision="bfloat16")
    assert rounded != figures["32"]
    assert rounded == pytest.approx(figures["32"], rel=0.02)


def test_other_tokens_are_counted_in_bytes(text: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "alpha"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    task = language(text, tokenizer=str(tmp_path / "tokenizer.json"))
    assert task.vocabulary == 5  # and the border
    assert 4 < task.bytes_per_token < 6
    scores, targets = torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    bits, count = task.judge(scores, targets)
    assert bits.item() / count.item() == pytest.approx(task.chance)
    assert task.chance == pytest.approx(math.log2(5) / task.bytes_per_token)


def test_it_is_learnt(text: str) -> None:
    task = language(text, length=16)
    recipe = Recipe(d_model=16, n_layer=1, steps=60, batch_size=8, learning_rate=1e-2)
    model = task_model(task, "mamba", recipe, seed=0, device=CPU)
    trainer = TaskTrainer(task, model, recipe, seed=0, device=CPU)
    before = evaluate_task(model, task)
    assert before == pytest.approx(task.chance, rel=0.05)
    point = trainer.advance(60)
    assert point.figure == pytest.approx(point.loss / math.log(2) / task.bytes_per_token, rel=1e-4)
    assert evaluate_task(model, task) < 0.5 * before


def test_text_that_is_too_short(text: str) -> None:
    with pytest.raises(DataError, match="windows are of 100,000"):
        language(text, length=100_000).to(CPU)
    with pytest.raises(DataError, match="leave this context out"):
        next(language(text).tests(50_000, 1, 1, CPU, 0))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mixer", "changes"),
    [
        ("mamba", {}),
        ("mamba", {"mixer_options": {"a_init": "s4d-lin"}}),
        ("s6", {"block": "mamba", "mixer_options": {"selective": ["B"], "d_state": 2}}),
        ("s6", {"block": "h3", "mixer_options": {"selective": []}}),
        ("hyena", {"block": "mamba", "mixer_options": {"bare": True, "max_length": 32}}),
        ("s4d", {"block": "h3", "mixer_options": {"bare": True}}),
        ("attention", {"parameters": 20_000, "d_intermediate": 64, "mixer_options": {"n_heads": 4}}),
        ("retnet", {"parameters": 20_000, "d_intermediate": 64, "mixer_options": {"n_heads": 4}}),
        ("mamba2", {"mixer_options": {"head_dim": 32}}),
    ],
    ids=str,
)
def test_a_captured_step_in_bfloat16_is_the_step(text: str, mixer: str, changes: dict[str, object]) -> None:
    device = torch.device("cuda")
    recipe = Recipe(**{"d_model": 32, "n_layer": 1, "precision": "bfloat16", **changes})  # type: ignore[arg-type]
    losses = []
    for capture in (True, False):
        task = language(text)
        model = task_model(task, mixer, recipe, seed=0, device=device)
        trainer = TaskTrainer(task, model, recipe, seed=0, device=device, capture=capture)
        losses.append([trainer.advance(5).loss for _ in range(2)])
        assert (trainer._graph is not None) == capture
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert evaluate_task(model, task, precision="bfloat16") < task.chance

"""Stopping, going on, damaged checkpoints, full disks: the losses stay those of a run that was never stopped."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longscan.errors import CheckpointError, StorageError, TrainingError
from longscan.training import TrainConfig, sealed
from longscan.training.sealed import describe_checkpoint, list_checkpoints
from tests.training.helpers import CONFIG, SHAPE, Silent, history, make_trainer


def after(calls: int) -> Callable[[], bool]:
    """A question that is answered by yes from the so-many-th time on."""
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        return asked >= calls

    return ask


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"carry_state": True, "accumulate": 2},
        {"optimizer": "adamw", "log_every": 5, "precision": "bfloat16"},
    ],
    ids=["muon", "carried", "bf16"],
)
def test_stopped_twice_equals_never_stopped(tmp_path: Path, changes: dict[str, object]) -> None:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    whole, model = make_trainer(tmp_path / "whole", config)
    assert whole.run()
    for stop in (3, 4):
        trainer, _ = make_trainer(tmp_path / "parts", config, stop=after(stop))
        assert not trainer.run()
    torch.manual_seed(123)  # the model of the new process starts elsewhere: the checkpoint must win
    trainer, resumed = make_trainer(tmp_path / "parts", config)
    assert trainer.run()
    assert history(tmp_path / "whole") == history(tmp_path / "parts")
    assert [row["step"] for row in history(tmp_path / "parts")] == list(range(1, 13))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert make_trainer(tmp_path / "parts", config)[0].run()  # a finished run stays finished
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def test_killed_between_checkpoints(tmp_path: Path) -> None:
    """What a kill leaves: metrics beyond the last checkpoint, a torn line, half a checkpoint."""
    whole, _ = make_trainer(tmp_path / "whole")
    whole.run()
    trainer, _ = make_trainer(tmp_path / "run", stop=after(5))
    trainer.run()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 9.0, "tokens": 1}\n{"step": 7, "lo')
    half = tmp_path / "run" / "checkpoints" / ".step-00000006.tmp"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000005", half)
    (half / "checkpoint.json").unlink()
    trainer, _ = make_trainer(tmp_path / "run")
    assert trainer.run()
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def events_of(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def test_events_have_no_gaps_or_doubles(tmp_path: Path) -> None:
    make_trainer(tmp_path, stop=after(5))[0].run()
    shutil.copytree(tmp_path / "events", tmp_path / "before")
    make_trainer(tmp_path)[0].run()
    assert events_of(tmp_path) == list(range(1, 13))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, how: str) -> None:
    make_trainer(tmp_path, stop=after(4))[0].run()
    make_trainer(tmp_path, stop=after(4))[0].run()
    victim = tmp_path / "checkpoints" / "step-00000008" / name
    content = victim.read_bytes()
    if how == "delete":
        victim.unlink()
    elif how == "cut":
        victim.write_bytes(content[: len(content) // 2])
    else:
        middle = content.index(b"0.") if name == "checkpoint.json" else len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(CheckpointError, match=name):
        describe_checkpoint(victim.parent)
    observer = Silent()
    trainer, _ = make_trainer(tmp_path, observer=observer)
    assert trainer.run()
    assert name in observer.warnings[0]
    assert "going on from step-00000004" in observer.warnings[0]
    whole, _ = make_trainer(tmp_path / "whole")
    whole.run()
    assert history(tmp_path) == history(tmp_path / "whole")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    make_trainer(tmp_path, stop=after(2))[0].run()
    trainer, _ = make_trainer(tmp_path, shape=dataclasses.replace(SHAPE, d_model=24))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit"):
        trainer.run()


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, stop=after(4))[0].run()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "flush", full)
        with pytest.raises(StorageError, match=r"step-00000008: .*No space left.*earlier checkpoints are untouched"):
            make_trainer(tmp_path, stop=after(4))[0].run()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4]
    assert make_trainer(tmp_path)[0].run()
    assert [row["step"] for row in history(tmp_path)] == list(range(1, 13))


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    observer = Silent()
    config = dataclasses.replace(CONFIG, checkpoint_minutes=1e-9, keep_checkpoints=2)
    make_trainer(tmp_path, config, observer=observer)[0].run()
    assert observer.saves == list(range(1, 13))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000011", "step-00000012"]


def test_the_best_checkpoint_is_kept_too(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, evaluations=6, keep_best=True, keep_checkpoints=1)
    estimates = iter([3.0, 1.0, 2.0, 4.0, 1.5, 1.25])
    observer = Silent()
    for stop in (7, 100):
        trainer, _ = make_trainer(tmp_path, config, stop=after(stop), observer=observer)
        trainer._estimate = lambda: next(estimates)
        trainer.run()
    assert observer.saves == [2, 4, 7, 12]
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [12, 4]


def test_what_a_kill_left_half_built_is_swept_away(tmp_path: Path) -> None:
    make_trainer(tmp_path, stop=after(4))[0].run()
    checkpoints = tmp_path / "checkpoints"
    for name in (".step-00000003.tmp", ".step-00000002.old"):
        shutil.copytree(checkpoints / "step-00000004", checkpoints / name)
    make_trainer(tmp_path)[0].run()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000012"]


def test_a_checkpoint_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    folder, building = sealed.place(tmp_path, 1)
    building.mkdir()
    sealed.seal(building, folder, {"format": 1}, {"../outside": "0"})
    with pytest.raises(CheckpointError, match="not in its folder"):
        describe_checkpoint(folder)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_minutes=1e-9)
    trainer, model = make_trainer(tmp_path, config, stop=after(4))
    trainer.run()
    trainer, model = make_trainer(tmp_path, config)
    trainer._restore()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = float("nan")
    trainer._restore = lambda: (4, 0.0)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="step 5: the loss is nan"):
        trainer.run()
    assert list_checkpoints(tmp_path / "checkpoints")[0][0] == 4
    assert history(tmp_path)[-1]["step"] == 4


def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    make_trainer(tmp_path / "one")[0].run()
    trainer, _ = make_trainer(tmp_path / "two")
    assert trainer._stepper.measure(0.05) > 0
    trainer.run()
    assert history(tmp_path / "one") == history(tmp_path / "two")


def test_training_learns(tmp_path: Path) -> None:
    config = TrainConfig(steps=40, batch_size=8, sequence_length=32, optimizer="muon")
    make_trainer(tmp_path, config)[0].run()
    losses = [row["loss"] for row in history(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]

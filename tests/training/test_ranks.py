"""Several processes, replicas or shards, give the losses and the gradient norms of one; any number of them goes on from
the checkpoint of any other number."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longscan.errors import ConfigError
from longscan.models import LanguageModel
from longscan.training.checkpoint import read_weights
from longscan.training.distributed import Ranks, join
from longscan.training.parallel import process_mesh
from longscan.training.sealed import list_checkpoints, newest_sound, read_about
from tests.training.helpers import history, make_trainer
from tests.training.worker import AGAIN, ALONE, CASES, GRIDS, config_of

# Measured on CPUs: 2.5e-7 in float32. Muon turns its matrices in bfloat16: 4e-5 of a loss, 8e-4 of a norm.
CLOSE = {"bfloat16": 5e-3, "gathered-bfloat16": 1e-2, "muon": 5e-3, "channels-muon": 5e-3}
# Cases that are one for one process. What travels in bfloat16 is rounded besides: 1.3e-4 of a loss, 3e-3 of a norm.
ALIKE = dict.fromkeys(("replicas", "compiled", "parts", "channels"), "fsdp")
ALIKE |= {"channels-muon": "muon", "gathered-bfloat16": "bfloat16"}


def torchrun(processes: int, folder: Path, *what: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.training.worker", str(folder), *what]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, folder, "cpu", *CASES, "full_disk")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of one process."""
    folder = tmp_path_factory.mktemp("one")
    for name in CASES:
        if name not in ALIKE:
            make_trainer(folder / name, config_of(name))[0].run()
    return folder


def assert_same_run(found: Path, expected: Path, rel: float = 2e-6) -> None:
    ours, theirs = history(found), history(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 9))
    for key in ("loss", "gradient_norm", "learning_rate"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=rel), key
    estimates = [[row["held_out_bits_per_byte"] for row in rows[3::4]] for rows in (ours, theirs)]
    assert estimates[0] == pytest.approx(estimates[1], rel=rel)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(two: Path, one: Path, name: str) -> None:
    assert_same_run(two / name, one / ALIKE.get(name, name), CLOSE.get(name, 2e-6))


def test_clipping_was_at_work(one: Path) -> None:
    assert max(row["gradient_norm"] for row in history(one / "fsdp")) > 0.5


def test_shards_are_gathered_to_a_whole_model(two: Path) -> None:
    for name in ("ddp", "fsdp", "channels"):
        gathered = LanguageModel.from_pretrained(two / name / "model").state_dict()
        (_, newest), *_ = list_checkpoints(two / name / "checkpoints")
        saved, _ = read_weights(newest)
        assert saved.keys() == gathered.keys() - {"lm_head.weight"}
        for key, tensor in saved.items():
            assert torch.equal(tensor, gathered[key]), key


def test_each_process_writes_its_shard(two: Path) -> None:
    (_, newest), *_ = list_checkpoints(two / "saved" / "checkpoints")
    about = read_about(newest)
    shards = [name for name in about["sha256"] if name.startswith("shard-")]
    assert (about["format"], about["processes"], len(shards)) == (2, 2, 2)
    sizes = [(newest / name).stat().st_size for name in shards]
    assert max(sizes) < 1.5 * min(sizes)
    assert sum(name.startswith("state-") for name in about["sha256"]) == 4
    assert not list(newest.parent.glob(".*"))
    assert not list(newest.parent.rglob("*.metadata"))  # the pickle of torch's other writer


def copy_until(source: Path, target: Path, step: int) -> None:
    """A run as it was when the checkpoint of a step was its last."""
    shutil.copytree(source, target)
    for number, path in list_checkpoints(target / "checkpoints"):
        if number > step:
            shutil.rmtree(path)


def test_one_goes_on_from_two(two: Path, one: Path, tmp_path: Path) -> None:
    """The checkpoint was written while training went on, and holds what was when it was begun."""
    copy_until(two / "saved", tmp_path / "run", 3)
    trainer, _ = make_trainer(tmp_path / "run", config_of("saved"))
    assert trainer.run()
    assert_same_run(tmp_path / "run", one / "saved")


def test_one_goes_on_from_channels(two: Path, one: Path, tmp_path: Path) -> None:
    copy_until(two / "channels", tmp_path / "run", 3)
    make_trainer(tmp_path / "run", dataclasses.replace(config_of("channels"), tensor_parallel=1))[0].run()
    assert_same_run(tmp_path / "run", one / "fsdp")


def test_three_go_on_from_two_and_from_one(two: Path, one: Path, tmp_path: Path) -> None:
    copy_until(two / "saved", tmp_path / "damaged", 4)
    damaged = tmp_path / "damaged" / "checkpoints" / "step-00000004" / "shard-00002-model-00001-of-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    newest, faults = newest_sound(tmp_path / "damaged" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000003"
    assert damaged.name in faults[0]
    copy_until(one / "saved", tmp_path / "one", 3)
    torchrun(3, tmp_path, "cpu", "go_on")
    for name in ("damaged", "one"):
        assert_same_run(tmp_path / name, one / "saved")
    for rank in range(3):
        (warning,) = json.loads((tmp_path / f"damaged-{rank}.json").read_text())
        assert damaged.name in warning
        assert "going on from step-00000003" in warning


def test_a_full_disk_of_one_process_stops_all_with_nothing_lost(two: Path) -> None:
    for rank in range(2):
        said = json.loads((two / f"full-{rank}.json").read_text())
        assert said.startswith("StorageError: cannot write the checkpoint")
        assert "step-00000002" in said
        assert "process 1: " in said
        assert "File too large" in said
        assert "earlier checkpoints are untouched" in said
    assert [path.name for path in (two / "full" / "checkpoints").iterdir()] == ["step-00000001"]


def test_two_by_two_ranks_equal_one(tmp_path: Path) -> None:
    """They go on from a checkpoint of one, and one from theirs, in which no shard is there twice."""
    one = tmp_path / "one"
    make_trainer(one, ALONE)[0].run()
    for name in AGAIN:
        copy_until(one, tmp_path / f"{name}-again", 5)
    torchrun(4, tmp_path, "cpu", "grids")
    for name in GRIDS:
        assert_same_run(tmp_path / name, one)
    for name in AGAIN:
        assert_same_run(tmp_path / f"{name}-again", one)
        resumed = tmp_path / f"{name}-resumed"
        copy_until(tmp_path / name, resumed, 3)
        saved = "checkpoints/step-00000003"
        assert folder_size(resumed / saved) < 1.6 * folder_size(one / saved)
        make_trainer(resumed, ALONE)[0].run()
        assert_same_run(resumed, one)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "names",
    [
        ("ddp", "fsdp", "recomputed", "compiled", "muon"),
        ("replicas", "parts", "bfloat16", "gathered-bfloat16"),
        ("channels", "channels-muon"),
        ("saved",),
    ],
    ids="-".join,
)
def test_two_gpus_equal_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    """NCCL; checkpoints are written meanwhile; one goes on from what two have saved."""
    device = torch.device("cuda", 0)
    torchrun(2, tmp_path, "cuda", *names)
    for name in {ALIKE.get(name, name) for name in names}:
        config = dataclasses.replace(config_of(name), cuda_graph=False)
        make_trainer(tmp_path / "one" / name, config, device=device)[0].run()
    for name in names:
        expected = tmp_path / "one" / ALIKE.get(name, name)
        assert_same_run(tmp_path / name, expected, CLOSE.get(name, 5e-5))
    for name in {"channels", "saved"}.intersection(names):
        copy_until(tmp_path / name, tmp_path / "resumed", 3)
        make_trainer(tmp_path / "resumed", dataclasses.replace(config_of(name), tensor_parallel=1), device=device)[
            0
        ].run()
        assert_same_run(tmp_path / "resumed", tmp_path / "one" / ALIKE.get(name, name), 5e-5)


def test_replicas_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs parallel = fsdp"):
        dataclasses.replace(config_of("ddp"), replicas=2)
    with pytest.raises(ConfigError, match="replicas must divide the processes; got 2 and 3"):
        process_mesh(Ranks(0, 3), config_of("replicas-shards"), torch.device("cpu"))


def test_channels_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no carry_state, compile or compile_blocks"):
        dataclasses.replace(config_of("saved"), tensor_parallel=2)
    with pytest.raises(ConfigError, match="tensor_parallel must divide the processes; got 2 and 3"):
        process_mesh(Ranks(0, 3), config_of("channels"), torch.device("cpu"))


def test_sequences_that_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must divide sequence_length; got 3 and 16"):
        dataclasses.replace(config_of("ddp"), sequence_parallel=3)
    with pytest.raises(ConfigError, match="carry_state reads on from another"):
        dataclasses.replace(config_of("saved"), sequence_parallel=2)
    with pytest.raises(ConfigError, match="must divide the processes; got 2 and 1"):
        make_trainer(tmp_path, config_of("parts"))


def test_an_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"RANK.*torchrun"), join("cpu"):
        pass

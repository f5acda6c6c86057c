"""`longscan train --nproc N` through kills, of a process and of the launcher, and to its end with one process."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from longscan.cli.generate import load_run
from tests.cli.test_main_job import call, metrics, start, wait_for_step
from tests.soak import record, recorded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

STEPS = 60
OPTIONS = ["--d-model", "16", "--n-layer", "1", "--batch-size", "12", "--sequence-length", "32", "--device", "cpu"]
OPTIONS += ["--precision", "float32", "--optimizer", "adamw", "--evaluations", "1", "--sample", "0"]
OPTIONS += ["--checkpoint-minutes", "0.0001", "--parallel", "fsdp"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processes")
    (place / "text.txt").write_text("".join(f"{i} squared is {i * i}\n" for i in range(3000)))
    return place


def train(name: str, *more: str, steps: int = STEPS) -> list[str]:
    return ["train", "text", "--data", "text.txt", "--name", name, "--steps", str(steps), *OPTIONS, *more]


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    found = [int(word) for word in path.read_text().split()] if path.exists() else []
    return [child for child in found if b"longscan" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_gone(processes: list[int]) -> None:
    wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of a run that nothing happened to."""
    code, out, error = call(place, *train("whole"))
    assert code == 0, out + error
    return place / "runs" / "whole"


@pytest.mark.parametrize("way", ["nproc", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_a_killed_process_is_started_anew_and_a_killed_run_goes_on(place: Path, whole: Path, way: str) -> None:
    run = place / "runs" / f"killed-by-{way}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    if way == "nproc":
        launcher = start(place, *train(run.name, "--nproc", "2", "--max-restarts", "1"))
    else:
        launcher = start(place, *train(run.name), python=[*torchrun, "-m", "longscan"])
    try:
        wait_for_step(run, 8, launcher)
        first = children(launcher.pid)
        assert len(first) == 2
        os.kill(random.Random(0).choice(first), signal.SIGKILL)
        wait_for(lambda: len(set(children(launcher.pid)) - set(first)) == 2)
        second = children(launcher.pid)
        wait_for_step(run, 30, launcher)
    finally:
        launcher.kill()
        out, error = launcher.communicate()
    assert f"started anew: going on with runs/{run.name}" in out, out + error
    wait_until_gone(second)  # its processes go with the launcher: none is left to write into the run
    assert 30 <= len(metrics(run)) < STEPS
    model, _ = load_run(run, "cpu")  # of the newest shards
    assert model.config.d_model == 16
    # Not only by other processes, but by such as have channels instead of shards.
    others = ["--nproc", "2", "--parallel", "ddp", "--tensor-parallel", "2"] if way == "nproc" else ["--nproc", "1"]
    code, out, error = call(place, "train", "--resume", f"runs/{run.name}", *others, "--sample", "0")
    assert code == 0, out + error
    assert_same_run(run, whole)
    assert not (place / "runs" / f"{run.name}-2").exists()


def assert_same_run(found: Path, expected: Path) -> None:
    ours, theirs = metrics(found), metrics(expected)
    assert [row["step"] for row in ours] == list(range(1, len(theirs) + 1))
    for key in ("loss", "gradient_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4), key


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """The folder of a run that has ended."""
    code, out, error = call(place, *train("lost", steps=5))
    assert code == 0, out + error
    return place / "runs" / "lost"


def test_a_lost_data_file_stops_with_nothing_lost(place: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    os.rename(place / "text.txt", place / "elsewhere.txt")
    try:
        code, _, error = call(place, "train", "--resume", "runs/lost")
        assert code == 2
        assert "text.txt" in error
        assert "Traceback" not in error
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    finally:
        os.rename(place / "elsewhere.txt", place / "text.txt")


def test_two_processes_do_not_train_one_run(place: Path, run: Path) -> None:
    import fcntl

    held = place / "runs" / "held"
    shutil.copytree(run, held)
    with open(held / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, error = call(place, "train", "--resume", "runs/held")
    assert code == 2
    assert "is being trained by another process" in error


@pytest.mark.soak
def test_a_hundred_kills(place: Path, countdown: Callable[[Iterable[int], int], Iterator[int]]) -> None:
    """Of one process or of the whole run, at random moments; then one or two go on. LONGSCAN_KILLS of them, from
    LONGSCAN_SEED: several calls that add up to a hundred are recorded beside one another."""
    kills, seed = (int(os.environ.get(f"LONGSCAN_{name}", default)) for name, default in (("KILLS", 100), ("SEED", 0)))
    moments, begin = random.Random(seed), time.monotonic()
    more = ["--nproc", "2"]
    steps = 20 * kills
    code, out, error = call(place, *train("reference", *more, steps=steps))
    assert code == 0, out + error
    run, arguments = place / "runs" / "hundred", train("hundred", *more, steps=steps)
    counts = {"of_one_process": 0, "of_the_whole_run": 0, "before_the_first_step": 0}
    for kill in countdown(range(kills), kills):
        process = start(place, *arguments)
        done = len(metrics(run)) if run.is_dir() and (run / "metrics.jsonl").is_file() else 0
        if kill == 0 or moments.random() < 0.8:
            wait_for_step(run, min(steps - 10, done + moments.randrange(1, 20)), process)
        else:
            counts["before_the_first_step"] += 1
        time.sleep(moments.uniform(0, 0.3))
        below = children(process.pid)
        one = bool(below) and moments.random() < 0.5
        counts["of_one_process" if one else "of_the_whole_run"] += 1
        for victim in [moments.choice(below)] if one else [process.pid, *below]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=120)
        wait_until_gone(below)
        if run.is_dir():
            arguments = ["train", "--resume", "runs/hundred", "--sample", "0", "--nproc", str(moments.choice([1, 2]))]
    code, out, error = call(place, *arguments)
    assert code == 0, out + error
    ours, theirs = metrics(run), metrics(place / "runs" / "reference")
    assert [row["step"] for row in ours] == list(range(1, steps + 1))
    off = {
        key: max(abs(mine[key] / other[key] - 1) for mine, other in zip(ours, theirs, strict=True))
        for key in ("loss", "gradient_norm")
    }
    found = {"seed": seed, "kills": kills} | counts | {"steps": steps, "largest_relative_difference": off}
    runs = [*recorded("kills").get("runs", []), found | {"seconds": round(time.monotonic() - begin)}]
    record("kills", {"kills": sum(each["kills"] for each in runs), "runs": runs})
    assert max(off.values()) < 1e-2, off

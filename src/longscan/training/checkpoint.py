"""What a checkpoint of a training run holds, how it is written, and how a run goes on from it."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from longscan.errors import CheckpointError, StorageError
from longscan.models import LanguageModel
from longscan.models.pretrained import load_weights
from longscan.nn.state import ModelState
from longscan.nn.storage import file_digest, load_tensors, save_tensors
from longscan.training.distributed import Ranks
from longscan.training.optimizers import Optimizers
from longscan.training.sealed import keep_only, newest_sound, place, read_about, seal, sweep

_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"


def save_weights(model: LanguageModel, path: Path) -> None:
    """Write a model's weights, tied ones once, as one file."""
    save_tensors(path, _weights(model), {"format": "pt"})


def read_weights(path: Path) -> tuple[dict[str, Tensor], Path]:
    """The weights of a sound checkpoint, whole whoever wrote it, on the CPU; and where they are from."""
    if (path / _WEIGHTS).is_file():
        return load_tensors(path / _WEIGHTS)[0], path / _WEIGHTS
    from longscan.training.sharded import read_into, stored_tensors

    # Names of the optimisers' tensors are paths.
    stored = {name: kind for name, kind in stored_tensors(path).items() if "/" not in name}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    read_into(path, tensors, None)
    return tensors, path


class Checkpoints:
    """The checkpoints of a run. Every process calls every method, in the same order.

    One process writes a file of weights and one of the optimisers' state, at once. Several write shards while training
    goes on (:mod:`longscan.training.sharded`). Either is read by any number of processes.

    Args:
        root: their folder.
        keep: the last so many are kept.
        saved: told the step and the folder of each that was written, in the first process.
    """

    def __init__(self, root: Path, *, ranks: Ranks, keep: int, saved: Callable[[int, Path], None]) -> None:
        self._root, self._ranks, self._keep, self._saved = root, ranks, keep, saved
        self._writing: tuple[int, Future[Any]] | None = None
        # Of its own: it is used while the training sends other things.
        self._group = torch.distributed.new_group(backend="gloo") if ranks.size > 1 else None

    def save(
        self,
        step: int,
        model: LanguageModel,
        optimizers: Optimizers,
        states: list[ModelState] | None,
        progress: dict[str, Any],
        *,
        best: int | None = None,
    ) -> None:
        """Write ``step-N``: to a hidden folder first, flushed to the disk, then renamed; then delete old ones.

        Several processes come back when everything is copied; the next call, or :meth:`finish`, waits for the files.

        Args:
            states: that this process carries, one per micro-batch.
            progress: JSON values, given back by :meth:`restore`.
            best: a step whose checkpoint is kept besides the last ones.

        Raises:
            StorageError: the disk refused; checkpoints written before are untouched.
        """
        self.finish()
        final, building = place(self._root, step)
        about = {
            "format": 1 if self._group is None else 2,
            "step": step,
            "processes": self._ranks.size,
            "random": _random_numbers(),
            "progress": progress,
        }

        def complete(digests: dict[str, str]) -> None:
            seal(building, final, about, digests)
            keep_only(self._root, self._keep, [] if best is None else [best])

        parts = {f"state-{self._ranks.rank}-{index}.safetensors": state for index, state in enumerate(states or [])}
        if self._group is not None:
            from longscan.models.tensor_parallel import undivided_rows
            from longscan.training.sharded import start_saving

            tensors = undivided_rows(model, _weights(model) | optimizers.tensors())
            self._writing = step, start_saving(building, tensors, parts, complete, self._group)
            return
        try:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            for name, state in parts.items():
                state.save(building / name)
            save_weights(model, building / _WEIGHTS)
            save_tensors(building / _OPTIMIZER, optimizers.tensors(), {})
            complete({path.name: file_digest(path) for path in building.iterdir()})
        except OSError as error:
            self._failed(step, error)
        self._saved(step, final)

    def finish(self) -> None:
        """Return when the last checkpoint is written.

        Raises:
            StorageError: the disk of any process refused; checkpoints written before are untouched.
        """
        if self._writing is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        step, writing = self._writing
        self._writing = None
        try:
            writing.result()
        except (Exception, CheckpointException) as error:  # the latter is no Exception, and may be of other processes
            self._failed(step, error)
        if self._ranks.first:
            self._saved(step, place(self._root, step)[0])

    def _failed(self, step: int, error: BaseException) -> NoReturn:
        final, building = place(self._root, step)
        if self._ranks.first:
            shutil.rmtree(building, ignore_errors=True)
        raise StorageError(
            f"cannot write the checkpoint {final}: {_reason(error)}; earlier checkpoints are untouched"
        ) from error

    def restore(
        self,
        model: LanguageModel,
        optimizers: Optimizers,
        *,
        device: torch.device,
        accumulate: int,
        warned: Callable[[str], None],
    ) -> tuple[int, list[ModelState] | None, dict[str, Any]] | None:
        """Put model, optimisers and random numbers back to where the newest sound checkpoint found them.

        Args:
            accumulate: micro-batches per process, each of which carries a state of its own.
            warned: is told of damaged checkpoints.

        Returns:
            Steps done, this process's carried states (None if there were none), and ``progress``; None if there is no
            checkpoint.

        Raises:
            CheckpointError: it is of another model, optimiser, or one that cannot be cut for so many processes; or it
                does not say what a run needs.
        """
        if self._ranks.first:
            sweep(self._root)
        path, faults = newest_sound(self._root, self._ranks)
        for fault in faults:
            going_on = f"going on from {path.name}" if path else "no earlier one is left: starting from the first step"
            warned(f"{fault}; {going_on}")
        if path is None:
            return None
        about = read_about(path)
        names = set(about["sha256"])
        if self._group is None and _WEIGHTS in names:
            _copy_weights(model, load_tensors(path / _WEIGHTS)[0], path / _WEIGHTS)
            optimizers.load_tensors(load_tensors(path / _OPTIMIZER)[0], path / _OPTIMIZER)
        else:
            _read_shards(path, model, optimizers, self._group)
        states = _read_states(path, names, self._ranks, accumulate)
        try:
            _set_random_numbers(about["random"])
            step, progress = int(about["step"]), dict(about["progress"])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not say what a run needs to go on: {error!r}") from error
        return step, states and [state.to(device) for state in states], progress


def _weights(model: LanguageModel) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def _copy_weights(model: LanguageModel, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy into the parameters that are there: the optimisers and a compiled model hold on to them."""
    with torch.device("meta"):
        loaded = LanguageModel(model.config)
    load_weights(loaded, tensors, source)
    model.load_state_dict(loaded.state_dict())


def _read_shards(path: Path, model: LanguageModel, optimizers: Optimizers, group: Any) -> None:
    from longscan.models.tensor_parallel import divide_rows, undivided_rows
    from longscan.training.sharded import read_into, stored_tensors

    stored = stored_tensors(path)
    tensors = _weights(model)
    faults = [f"{name} is missing" for name in tensors if name not in stored]
    faults += [
        f"{name} is {tuple(stored[name][0])}, expected {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in stored and stored[name][0] != tensor.shape
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit the model's configuration; {'; '.join(faults[:5])}")
    state = optimizers.empty({name: kind for name, kind in stored.items() if name not in tensors}, path)
    read = undivided_rows(model, tensors | state)
    read_into(path, read, group)
    divide_rows(model, tensors | state, read)
    optimizers.load_tensors(state, path)


def _read_states(path: Path, names: set[str], ranks: Ranks, accumulate: int) -> list[ModelState] | None:
    """The rows of the batch that this process carries on, whoever carried them before."""
    places = sorted(tuple(map(int, name.split(".")[0].split("-")[1:])) for name in names if name.startswith("state-"))
    if not places:
        return None
    whole = ModelState.cat([ModelState.load(path / "state-{}-{}.safetensors".format(*place)) for place in places])
    parts = ranks.size * accumulate
    if whole.batch % parts:
        raise CheckpointError(f"{path} carries the states of {whole.batch} rows, which {parts} parts cannot share")
    rows = whole.batch // parts
    starts = range(ranks.rank * accumulate * rows, (ranks.rank + 1) * accumulate * rows, rows)
    return [whole.select(range(start, start + rows)) for start in starts]


def _reason(error: BaseException) -> str:
    """What went wrong, of an error that may hold those of several processes."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict):
        texts = {rank: failure[0] if isinstance(failure, tuple) else failure for rank, failure in failures.items()}
        return "; ".join(f"process {rank}: {text}" for rank, text in sorted(texts.items()))
    return str(error)


def _random_numbers() -> dict[str, Any]:
    def text(state: Tensor) -> str:
        return base64.b64encode(state.cpu().numpy().tobytes()).decode()

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": text(torch.get_rng_state()), "cuda": [text(state) for state in cuda]}


def _set_random_numbers(saved: dict[str, Any]) -> None:
    def state(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(state(saved["cpu"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state(text) for text in saved["cuda"]])

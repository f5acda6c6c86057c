"""`longscan train text`: the main job, from text to a trained model, its figures and a sample."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from longscan.cli.stop import Stop
from longscan.cli.train_options import Options, device_type, parse, saved_options
from longscan.errors import ConfigError, DataError
from longscan.tasks.sources import STDLIB
from longscan.tasks.tokenizers import BYTES
from longscan.training.config import TrainConfig

# `Options`, `parse` and `run` are what every command has.
__all__ = ["Options", "parse", "run"]


def run(options: Options) -> int:
    """Train, measure, sample. Exit code 0; 130 or 143 after a stop by Ctrl-C or SIGTERM, with everything saved."""
    if options.nproc < 1 or options.max_restarts < 0:
        raise ConfigError(
            f"nproc must be at least 1 and max_restarts not negative, got {options.nproc} and {options.max_restarts}"
        )
    if options.sample < 0:
        raise ConfigError(f"sample must not be negative, got {options.sample}")
    if options.nproc > 1 and "WORLD_SIZE" not in os.environ:
        from longscan.cli.launch import launch

        return launch(options.nproc, options.max_restarts)
    import torch

    from longscan.cli.progress import Display
    from longscan.training import join

    with (
        join(device_type(options.device)) as (ranks, device),
        Display(quiet=not ranks.first) as display,
    ):
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        stop = Stop()
        job = Job(options, ranks, device, stop, display)
        job.prepare()  # nothing to save yet: a signal ends it at once
        with stop:
            if job.train() and job.finish():
                return 0
        display.line(f"stopped; go on with: [bold]longscan train --resume {job.folder}[/]")
        return 128 + (stop.signal or signal.SIGINT)


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


class _Stopped(Exception):
    """Thrown out of a long evaluation."""


class Job:
    """One training job, in three parts; the last two return False if they were stopped."""

    def __init__(self, options: Options, ranks: Any, device: Any, stop: Stop, display: Any) -> None:
        self._options, self._ranks, self._device, self._stop, self._display = options, ranks, device, stop, display
        self.folder = options.resume if options.resume is not None else options.runs / options.name

    def prepare(self) -> None:
        """Read the text, build the model, fix the number of steps, make the folder of the run."""
        import torch

        from longscan.models import LanguageModel, LanguageModelConfig
        from longscan.tasks.text import prepare
        from longscan.training import Batches, Stepper, create_run, read_run
        from longscan.training.runs import check_name

        self._rejoin()
        options, display = self._options, self._display
        if options.resume is None:
            check_name(options.name)  # before the work, not after it
        # The first process builds the corpus, the others find it in the cache; each compares its share of the files.
        share = (self._ranks.rank, self._ranks.size)
        for turn in (True, False):
            if turn == self._ranks.first:
                with display.amounts() as progress:
                    self.corpus, self.tokenizer = prepare(options.text, share=share, progress=progress)
            self._ranks.wait()
        corpus = self.corpus
        if options.resume is not None:
            self._same_corpus(read_run(options.resume).get("corpus", {}))
        own = options.model
        fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        fields["mixer"] = own.mixer if len(own.mixer) > 1 else own.mixer[0]
        shape = LanguageModelConfig(**fields, vocab_size=self.tokenizer.vocab_size)
        training = options.training
        torch.manual_seed(training.seed)
        self.model = LanguageModel(shape, device=self._device)
        batches = Batches(
            corpus.train, training.batch_size, training.sequence_length, training.seed, training.carry_state
        )
        self.stepper = Stepper(self.model, training, batches, ranks=self._ranks, device=self._device)
        display.line(
            f"text: {corpus.label}: {corpus.train_bytes / 1e6:.1f} MB to train ({_documents(corpus.train_documents)}), "
            f"{corpus.held_out_bytes / 1e6:.2f} MB held out ({_documents(corpus.held_out_documents)})"
        )
        size = f"{self.model.num_parameters() / 1e6:.2f}M parameters"
        display.line(
            f"model: {shape.n_layer} x {'+'.join(shape.mixer_names)}, d_model {shape.d_model}, {size}, {self._device}"
        )
        if training.steps is None:
            minutes = training.minutes if training.minutes is not None else 5.0
            with display.status("measuring the time of a step"):
                seconds = self.stepper.measure()
                evaluation = self._evaluation_seconds()
            # Never less than half of the time for training, however slow the evaluation.
            left = max(minutes * 60 - evaluation, minutes * 30)
            steps = training.steps_in(left, seconds, len(corpus.train))
            training = dataclasses.replace(training, steps=steps)
            display.line(
                f"here a step takes {1e3 * seconds:.0f} ms and the final evaluation {evaluation:.0f} s: "
                f"{steps} steps, {(steps * seconds + evaluation) / 60:.2g} of {minutes:g} minutes"
            )
        self.training = training
        if options.resume is None:
            if self._ranks.first:
                self.folder = create_run(options.runs, options.name, self._description(shape, training))
                self.tokenizer.save(self.folder)
                display.line(f"run: [bold]{self.folder}[/]")
            self.folder = self._ranks.share(self.folder)  # its name may have got a number

    def _rejoin(self) -> None:
        """Processes that torchrun has started anew go on with the run that those before them have made."""
        from longscan.training.distributed import launch_id, restarts
        from longscan.training.runs import find_launched

        launch = launch_id()
        if self._options.resume is not None or launch is None or not restarts():
            return
        folder = self._ranks.share(find_launched(self._options.runs, self._options.name, launch))
        if folder is not None:
            kept = {"sample": self._options.sample, "resume": folder}
            self._options = dataclasses.replace(saved_options(folder), **kept)
            self.folder = folder
            self._display.line(f"started anew: going on with [bold]{folder}[/]")

    def _evaluation_seconds(self) -> float:
        """How long the whole held-out part will take, from two shorter passes over its beginning."""
        from longscan.evaluation import stream_nats

        tokens = self.corpus.held_out
        few = min(len(tokens), 65536)
        for _ in range(2):  # the first one compiles kernels
            begin = time.perf_counter()
            stream_nats(self.model, tokens[:few], precision=self._options.training.precision)
            seconds = time.perf_counter() - begin
        return self._ranks.broadcast(seconds * len(tokens) / few, self._device)

    def _description(self, shape: Any, training: TrainConfig) -> dict[str, Any]:
        from longscan import __version__, diagnostics
        from longscan.training.distributed import launch_id

        text = dataclasses.asdict(self._options.text)
        for key in ("data", "tokenizer"):
            path = Path(text[key]).expanduser()
            if text[key] not in (STDLIB, BYTES) and path.exists():
                text[key] = str(path.resolve())  # the run may be resumed from another folder
        return {
            "longscan": __version__,
            "text": text,
            "model": shape.to_dict(),
            "training": dataclasses.asdict(training),
            "corpus": self.corpus.describe(),
            "device": self._device.type,
            "launch": launch_id(),
            "machine": diagnostics.describe_machine(),
            "versions": diagnostics.versions(),
            "commit": diagnostics.commit(),
        }

    def _same_corpus(self, saved: dict[str, Any]) -> None:
        if saved.get("key") != self.corpus.key:
            raise DataError(
                f"--resume {self.folder}: the text has changed since the run began ({saved.get('train_bytes')} bytes "
                f"to train on then, {self.corpus.train_bytes} now); going on would not be the same run. Start a new one"
            )

    def train(self) -> bool:
        """All steps, from the last checkpoint on."""
        from longscan.evaluation import nats_by_position
        from longscan.training import Trainer
        from longscan.training.runs import hold

        training, corpus = self.training, self.corpus
        assert training.steps is not None
        per_token = len(corpus.train) / corpus.train_bytes / math.log(2)
        held_out_per_token = len(corpus.held_out) / corpus.held_out_bytes / math.log(2)

        def estimate() -> float:
            windows = max(1, 65536 // training.sequence_length)
            length, rows = training.sequence_length, training.batch_size
            nats = nats_by_position(
                self.model, corpus.held_out, windows=windows, length=length, rows=rows, precision=training.precision
            )
            return float(nats.mean()) * held_out_per_token

        trainer = Trainer(
            self.folder,
            training,
            self.stepper,
            ranks=self._ranks,
            device=self._device,
            bits_per_byte=per_token,
            observer=self._display,
            estimate=estimate,
            should_stop=self._stop,
        )
        held = hold(self.folder) if self._ranks.first else contextlib.nullcontext()
        with held, self._display.training(training.steps):
            return trainer.run()

    def finish(self) -> bool:
        """Weights, held-out bits per byte, curve and sample."""
        from longscan.training import gather

        whole = gather(self.model, self._ranks)
        finished = whole is None or not self._ranks.first or self._measure(whole)
        # The others wait here while the first evaluates: leaving would end it too.
        return bool(self._ranks.share(finished))

    def _measure(self, model: Any) -> bool:
        from longscan.cli.evaluate import measure
        from longscan.cli.generate import stream_sample
        from longscan.nn.storage import write_text
        from longscan.plots.training import training_curve
        from longscan.training.checkpoint import save_weights
        from longscan.training.metrics import METRICS_FILE, read_metrics
        from longscan.training.runs import HELD_OUT_FILE, SAMPLE_FILE

        save_weights(model, self.folder / "model.safetensors")
        try:
            with self._display.fraction("held-out part") as progress:

                def tell(done: float) -> None:
                    if self._stop():
                        raise _Stopped
                    progress(done)

                report = measure(model, self.corpus, precision=self.training.precision, progress=tell)
        except _Stopped:
            return False
        write_text(self.folder / HELD_OUT_FILE, json.dumps(report, indent=2) + "\n")
        self._display.held_out(report)
        rows = read_metrics(self.folder / METRICS_FILE)
        compressors = report["compressors_bits_per_byte"]
        title = f"{self.folder.name}: {self.corpus.label}"
        curve = self.folder / "curves.png"
        training_curve(rows, curve, title=title, compressors=compressors, held_out=report["bits_per_byte"])
        self._display.line(f"curve: {curve}")
        if self._options.sample:
            prompt = "def " if self._options.text.data == "stdlib" else ""
            self._display.line(f"a sample{f' after {prompt!r}' if prompt else ''}:")
            length = self._options.sample
            text = stream_sample(model, self.tokenizer, prompt, sys.stdout, max_tokens=length, seed=0)
            write_text(self.folder / SAMPLE_FILE, text)
        self._display.line(f"more: [bold]longscan generate {self.folder} --prompt {'def '!r}[/]")
        return True

"""What a fuzzer feeds: bytes as files of every kind that we read, and as command lines.

``python -m tests.fuzz.targets NAME [options of libFuzzer]`` runs one without end, guided by coverage, where atheris is
installed (the extra ``fuzz``). It begins with sound files.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    import atheris

    # What is instrumented guides the search: what parses, not torch.
    instrumented = atheris.instrument_imports(include=["longscan", "json", "tomllib", "tyro", "pickletools"])
else:
    instrumented = contextlib.nullcontext()

with instrumented:
    import torch

    from longscan import LanguageModel, LanguageModelConfig
    from longscan.cli import COMMANDS, main
    from longscan.cli.config import merge, read_toml
    from longscan.cli.train_options import Options, saved_options
    from longscan.models.pretrained import load_config
    from longscan.nn.storage import json_digest, load_pickled, load_tensors
    from longscan.tasks.corpus import build_corpus, open_corpus
    from longscan.tasks.sources import open_source
    from longscan.tasks.tokenizers import ByteTokenizer, load_tokenizer
    from longscan.training import TrainConfig
    from longscan.training.runs import create_run
    from longscan.training.sealed import describe_checkpoint, list_checkpoints, newest_sound
    from tests.fuzz.damage import names, nothing_done, refused_or_read
    from tests.training.helpers import SHAPE, make_trainer

Read = Callable[[bytes], None]


class Target(NamedTuple):
    """What is done with bytes, and sound ones to begin with."""

    read: Read
    seeds: list[bytes]


def replace(path: Path, content: bytes) -> None:
    """Another file of the same name: what is mapped into memory must not change."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def forged(content: bytes) -> bytes:
    """JSON with the checksum that belongs to it, so that a reader looks at what it says; else as it is."""
    try:
        values = json.loads(content)
        del values["self"]
        return json.dumps(values | {"self": json_digest(values)}).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return content


def weights(folder: Path) -> Target:
    shape = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16, mixer_options={"d_state": 2})
    LanguageModel(shape).save_pretrained(folder)
    path = folder / "model.safetensors"

    def read(content: bytes) -> None:
        replace(path, content)
        for reader in (load_tensors, lambda path: LanguageModel.from_pretrained(path.parent)):
            with refused_or_read(folder):
                reader(path)

    return Target(read, [path.read_bytes()])


def pickles(folder: Path) -> Target:
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": torch.arange(3)}, path)
    zipped = path.read_bytes()
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)

    def read(content: bytes) -> None:
        replace(path, content)
        with refused_or_read(folder):
            load_pickled(path)

    return Target(read, [zipped, path.read_bytes()])


def checkpoints(folder: Path) -> Target:
    """What a checkpoint says of itself, as it is and with its checksum put right: read, and gone on with."""
    make_trainer(folder, TrainConfig(steps=1, batch_size=2, sequence_length=4, carry_state=True))[0].run()
    root = folder / "checkpoints"
    (_, newest), *_ = list_checkpoints(root)
    path = newest / "checkpoint.json"
    trainer, _ = make_trainer(folder, TrainConfig(steps=1, batch_size=2, sequence_length=4, carry_state=True))

    def read(content: bytes) -> None:
        for text in (content, forged(content)):
            replace(path, text)
            for reader in (describe_checkpoint, lambda path: newest_sound(path.parent), lambda _: trainer._restore()):
                with refused_or_read(folder):
                    reader(newest)

    return Target(read, [path.read_bytes()])


def shards(folder: Path) -> Target:
    """A corpus's manifest, as it is and with its checksum put right, after the bytes of a shard's end."""
    (folder / "text").write_text("".join(f"line {i}\n" for i in range(50)))
    corpus = folder / "shards"
    build_corpus(open_source(str(folder / "text")), ByteTokenizer(), held_out=0.2, out=corpus, shard_tokens=64)
    manifest, shard = corpus / "manifest.json", corpus / "train-00000.bin"
    whole = shard.read_bytes()

    def read(content: bytes) -> None:
        tail, _, content = content.partition(b"\0")
        replace(shard, whole[:-8] + tail)
        for text in (content, forged(content)):
            replace(manifest, text)
            with refused_or_read(folder):
                len(open_corpus(corpus).train[:9])

    return Target(read, [whole[-8:] + b"\0" + manifest.read_bytes()])


def models(folder: Path) -> Target:
    """Configurations of models, ours and others'."""
    ours = LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16).to_json()
    others = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16, "state_size": 2}
    original = {"d_model": 8, "n_layer": 1, "vocab_size": 10, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}

    def read(content: bytes) -> None:
        replace(folder / "config.json", content)
        with refused_or_read(folder):
            load_config(folder)
        with refused_or_read(folder):
            LanguageModelConfig.from_json(content.decode(errors="replace"))

    return Target(read, [ours.encode(), json.dumps(others).encode(), json.dumps(original).encode()])


def runs(folder: Path) -> Target:
    """The configuration of a run, and that of a new one in TOML."""
    values: dict[str, Any] = {
        "text": {"data": "stdlib"}, "model": SHAPE.to_dict(), "training": {"steps": 1}, "corpus": {}, "device": "cpu",
    }  # fmt: skip
    run = create_run(folder, "run", values)
    toml = (
        b'device = "cpu"\n[text]\ndata = "stdlib"\n[model]\nd_model = 64\nmixer = ["mamba"]\n[training]\nclip = 1.5\n'
    )

    def read(content: bytes) -> None:
        replace(run / "config.json", content)
        replace(run / "x.toml", content)
        with refused_or_read(folder):
            saved_options(run)
        with refused_or_read(folder):
            merge(Options(), read_toml(run / "x.toml"), "x.toml")

    return Target(read, [(run / "config.json").read_bytes(), toml])


def tokenizers(folder: Path) -> Target:
    from longscan.tasks.bpe import learn_bpe

    (folder / "text").write_text("to be or not to be\n" * 99)
    learn_bpe("bpe:270", open_source(str(folder / "text")), held_out=0.2, cache=folder).save(folder)
    path = folder / "tokenizer.json"

    def read(content: bytes) -> None:
        replace(path, content)
        with refused_or_read(folder):
            load_tokenizer(str(path)).encode(b"to be")

    return Target(read, [path.read_bytes()])


def arguments(folder: Path) -> Target:
    """Command lines, a word a line: options, or a refusal in words. What commands do is not done."""
    modules = [importlib.import_module(f"longscan.cli.{command}") for command in COMMANDS]

    def read(content: bytes) -> None:
        said, before = io.StringIO(), os.getcwd()
        with contextlib.ExitStack() as stack:
            stack.callback(os.chdir, before)
            os.chdir(folder)
            for module in modules:
                stack.enter_context(mock.patch.object(module, "run", return_value=0))
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(contextlib.redirect_stderr(said))
            stack.enter_context(nothing_done())
            try:
                code = main(content.decode(errors="replace").split("\n"))
            except SystemExit as stop:
                code = stop.code
        assert code in (0, 2), code
        assert code == 0 or said.getvalue().strip(), "refused without a word"
        assert names(folder) == []

    lines = ["train text --steps 3 --d-model=16 --mixer mamba s4d --clip 0.5", "generate runs/x --prompt a --seed 1"]
    lines += ["evaluate runs/x --tasks piqa,arc", "bench scan --device cpu --shapes 1,2,3", "prepare --held-out 0.1"]
    return Target(read, [line.replace(" ", "\n").encode() for line in lines])


TARGETS: dict[str, Callable[[Path], Target]] = {
    make.__name__: make for make in (weights, pickles, checkpoints, shards, models, runs, tokenizers, arguments)
}


def fuzz(name: str, options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, seeds = Path(folder, "work"), Path(folder, "seeds")
        place.mkdir()
        seeds.mkdir()
        target = TARGETS[name](place)
        for number, content in enumerate(target.seeds):
            (seeds / str(number)).write_bytes(content)
        os.environ["COLUMNS"] = "100"
        atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=3000", *options, str(seeds)], target.read)
        atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])

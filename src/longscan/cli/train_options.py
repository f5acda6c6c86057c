"""What `longscan train` is told: flags over a configuration file, or over the run to resume, over the defaults."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longscan.cli.config import differences, merge, read_toml
from longscan.errors import ConfigError
from longscan.tasks.text import TextConfig, recipe
from longscan.training.config import LAYOUT, TrainConfig

TASKS = ("text",)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model."""

    d_model: int = 192
    """Width of the residual stream."""
    n_layer: int = 4
    """Residual blocks."""
    mixer: tuple[str, ...] = ("mamba",)
    """Mixer of each layer; several names are cycled over."""
    d_intermediate: int = 0
    """Width of the MLP after each mixer; 0: none."""
    mixer_options: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Options of the mixer; in a configuration file only."""
    block: Literal["plain", "h3", "mamba", "ungated"] = "plain"
    """Shape around each mixer: the block of H3, of Mamba, or Mamba's without its gate; "plain": none."""
    block_options: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)
    """Options of the block's shape; in a configuration file only."""
    norm: Literal["rms", "layer"] = "rms"
    """Norms, of the root mean square or of layers."""
    prenorm: bool = True
    """Norms stand before mixers and MLPs; else after each sum, as in the first Transformer."""
    mlp: Literal["gated", "relu", "gelu", "gelu_tanh"] = "gated"
    """SwiGLU, or a plain MLP with this between its matrices."""
    positions: Literal["none", "sinusoidal", "learned"] = "none"
    """Positions added to the embedding."""
    max_positions: int = 0
    """Tokens of the longest sequence, of learned positions."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a language model on text and measure it: with no option, on Python's standard library.

    Leaves runs/NAME with the model, its configuration, metrics, curves and checkpoints. Stop it with Ctrl-C; go on with
    longscan train --resume runs/NAME.
    """

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""
    name: str = "text"
    """Name of the run; if it is taken, -2, -3, ... is added."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    config: Path | None = None
    """TOML file with values for these options in [text], [model], [training]; flags win over it."""
    resume: Path | None = None
    """Go on with this run from its last checkpoint; other options must be as they were."""
    sample: int = 400
    """Tokens of the sample at the end; 0: none."""
    nproc: int = 1
    """Processes to train with on this machine, each with a GPU of its own if there are any; as torchrun starts them."""
    max_restarts: int = 0
    """With `nproc`: start the processes anew so many times if one dies; they go on from the last checkpoint."""


def parse(arguments: list[str], prog: str) -> Options:
    """Options from flags over the configuration file (or the run to resume) over the defaults for the device.

    Raises:
        ConfigError: the file or the run cannot be used, or a flag contradicts the run.
    """
    words = list(arguments)
    if words and not words[0].startswith("-"):
        if words[0] not in TASKS:
            raise ConfigError(f"task: {words[0]!r} is not known; one of: {', '.join(TASKS)}")
        prog, words = f"{prog} {words[0]}", words[1:]
    elif not any(word.split("=")[0] in ("--resume", "-h", "--help") for word in words):
        raise ConfigError(
            f"name a task ({', '.join(TASKS)}), as in `longscan train text`, or a run: --resume runs/NAME"
        )
    resume, config, device = (_peek(words, flag) for flag in ("--resume", "--config", "--device"))
    if resume is not None:
        saved = saved_options(Path(resume))
        chosen = _flags(words, prog, saved)
        ours = dataclasses.replace(chosen, config=saved.config, resume=saved.resume)
        if chosen.config is not None:
            ours = merge(ours, read_toml(chosen.config), str(chosen.config))
        # How many processes go on, and what each has of the model, is free, and so is the sample.
        layout = {name: getattr(saved.training, name) for name in LAYOUT}
        same = dataclasses.replace(
            ours,
            training=dataclasses.replace(ours.training, **layout),
            sample=saved.sample,
            nproc=saved.nproc,
            max_restarts=saved.max_restarts,
        )
        changed = differences(saved, same)
        if changed:
            raise ConfigError(f"--resume {resume} goes on with its own configuration, but {'; '.join(changed)}")
        return dataclasses.replace(ours, resume=Path(resume))
    values = read_toml(Path(config)) if config is not None else {}
    device = device or values.get("device", "auto")
    defaults = merge(Options(), recipe(device_type(str(device))), "default recipe")
    return _flags(words, prog, merge(defaults, values, str(config)))


def _flags(words: list[str], prog: str, defaults: Options) -> Options:
    return tyro.cli(tyro.conf.OmitArgPrefixes[Options], args=words, prog=prog, default=defaults)


def _peek(words: list[str], flag: str) -> str | None:
    """The value of a flag, before the flags are parsed in earnest."""
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{flag}="):
            return word[len(flag) + 1 :]
    return None


def device_type(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def saved_options(folder: Path) -> Options:
    """The options a run was started with.

    Raises:
        ConfigError: the folder is not a run, or its configuration was changed by hand to something not allowed.
    """
    from longscan.models import LanguageModelConfig
    from longscan.training.runs import read_run

    saved = read_run(folder)
    shape = LanguageModelConfig.from_dict(saved["model"])
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(ModelOptions)}
    model = ModelOptions(**{**fields, "mixer": shape.mixer_names})
    values = {"text": saved["text"], "training": saved["training"], "device": saved.get("device", "auto")}
    options = merge(Options(model=model), values, str(folder / "config.json"))
    return dataclasses.replace(options, name=folder.name, runs=folder.parent)

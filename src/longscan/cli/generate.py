"""`longscan generate runs/NAME --prompt "def "`: text from a trained model, as it comes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from longscan.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """Continue a prompt with a trained model, streaming the text to the terminal."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; "-" reads it from standard input."""
    max_tokens: int = 400
    """Most new tokens."""
    temperature: float = 0.8
    """0: always the likeliest token; 1: as the model says."""
    top_k: int = 0
    """Only the so many likeliest tokens; 0: all."""
    top_p: float = 0.95
    """Only the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens with at least this fraction of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there before become less likely."""
    seed: int | None = None
    """The same seed gives the same text; default: another one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the output."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    weights: Literal["saved", "int8"] = "saved"
    """"int8": matrices in a byte a weight: on a CPU about three times as fast as float32."""


def choose_device(device: str) -> str:
    """The device that "auto" means here, or the one asked for.

    Raises:
        ConfigError: "cuda" where there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch finds no GPU here; use --device cpu")
    return device


def load_run(folder: Path, device: str, weights: str = "saved") -> tuple[Any, Any]:
    """Model and tokenizer of a run: what it ended with, or its newest sound checkpoint if it has not ended yet.

    Args:
        folder: of the run.
        device: "auto", "cpu" or "cuda".
        weights: "saved": as they are; "int8": quantised (:meth:`longscan.LanguageModel.quantize`).

    Raises:
        ConfigError: the folder is not a run.
        CheckpointError: nothing is saved yet, or it is damaged.
    """
    import torch

    from longscan.models import LanguageModel, LanguageModelConfig
    from longscan.models.pretrained import WEIGHTS_FILE, load_weights
    from longscan.nn.storage import load_tensors
    from longscan.tasks.tokenizers import BYTES, TOKENIZER_FILE, load_tokenizer
    from longscan.training.checkpoint import read_weights
    from longscan.training.loop import CHECKPOINTS_FOLDER
    from longscan.training.runs import read_run
    from longscan.training.sealed import newest_sound

    config = read_run(folder)
    device = choose_device(device)
    if (folder / WEIGHTS_FILE).is_file():
        tensors, path = load_tensors(folder / WEIGHTS_FILE, device)[0], folder / WEIGHTS_FILE
    else:
        newest, faults = newest_sound(folder / CHECKPOINTS_FOLDER)
        if newest is None:
            why = "; ".join(faults) or "it has no checkpoint yet"
            raise CheckpointError(f"{folder} has no model: {why}; train on with: longscan train --resume {folder}")
        tensors, path = read_weights(newest)
    with torch.device("meta"):
        model = LanguageModel(LanguageModelConfig.from_dict(config["model"]))
    load_weights(model, tensors, path)
    model.to(device)
    if weights != "saved":
        model.quantize(weights)
    name = config["text"]["tokenizer"]
    own = folder / TOKENIZER_FILE
    return model.eval(), load_tokenizer(BYTES if name == BYTES else str(own) if own.is_file() else name)


def stream_sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    out: TextIO,
    *,
    max_tokens: int,
    stop: tuple[str, ...] = (),
    **sampling: Any,
) -> str:
    """Write a prompt and its continuation to ``out`` token by token; a document's end ends it. Gives all of it."""
    # A command line may hold bytes that are no text; the model reads them as they are.
    given = prompt.encode("utf-8", "surrogateescape")
    prompt = given.decode("utf-8", "replace")
    tokens = [tokenizer.border, *tokenizer.encode(given).tolist()]
    options = {"temperature": 0.8, "top_p": 0.95, **sampling}
    written = [prompt]
    out.write(prompt)
    stream = model.stream(
        tokens, max_tokens, stop=stop, stop_tokens=[tokenizer.border], decode=tokenizer.decode, **options
    )
    for item in stream:
        written.append(item.text)
        out.write(item.text)
        out.flush()
    out.write("\n")
    out.flush()
    return "".join(written)


def run(options: Options) -> int:
    """Stream one sample to standard output.

    Raises:
        ConfigError: no token is asked for.
    """
    if options.max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {options.max_tokens}")
    model, tokenizer = load_run(options.run, options.device, options.weights)
    prompt = options.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    stream_sample(
        model,
        tokenizer,
        prompt,
        sys.stdout,
        max_tokens=options.max_tokens,
        stop=options.stop,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    return 0

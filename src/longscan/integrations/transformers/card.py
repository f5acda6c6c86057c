"""A model's card for the Hugging Face Hub: what it is, and what was measured; nothing that no file says."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longscan.errors import CheckpointError, IntegrationError
from longscan.nn.storage import write_text
from longscan.training.metrics import METRICS_FILE, read_metrics

#: Files of a run with figures of held-out text, the fuller one first.
_HELD_OUT = ("evaluation.json", "held_out.json")

_CARD = "README.md"


def model_card(model: Any, run: str | Path | None = None, tags: Sequence[str] = ()) -> str:
    """The card of a :class:`LongscanForCausalLM`, as Markdown with its metadata.

    Args:
        model: the model.
        run: folder of `longscan train`; its configuration and the figures in it are told. Without one, the card says
            that nothing was measured.
        tags: more tags for its metadata.

    Raises:
        CheckpointError: the run's folder is not there, or a file in it is damaged.
    """
    config = model.config.to_longscan()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    mixers = " and ".join(dict.fromkeys(config.mixer_names))
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(['longscan', 'state-space-model', *tags])}",
        "---",
        "",
        "# A longscan language model",
        "",
        f"{parameters:,} parameters: {config.n_layer} layers of {mixers}, width {config.d_model}, "
        f"{config.vocab_size:,} tokens.",
        "",
        "```python",
        "import longscan.integrations.transformers as hf",
        "hf.register()",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("this repository")',
        "```",
        "",
        "It also loads without Transformers: `longscan.LanguageModel.from_pretrained`.",
        "",
        "## What was measured",
        "",
        *(_measured(Path(run)) if run is not None else ["Nothing was recorded with this upload."]),
        "",
    ]
    return "\n".join(lines)


def _measured(run: Path) -> list[str]:
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; a run is a folder that `longscan train` has made")
    lines: list[str] = []
    for name in _HELD_OUT:
        figures = _read(run / name)
        if figures is not None:
            lines += [f"On held-out text ({figures['text']}):", "", "| | |", "|---|---:|"]
            lines += [f"| {key.replace('_', ' ')} | {_number(value)} |" for key, value in _plain(figures)]
            lines += ["", f"How: {figures['how']}.", ""] if "how" in figures else [""]
            break
    rows = read_metrics(run / METRICS_FILE)
    if rows:
        last: dict[str, Any] = {}
        for row in rows:
            last.update(row)
        lines += ["The last that was logged in training:", "", "| | |", "|---|---:|"]
        lines += [f"| {key.replace('_', ' ')} | {_number(value)} |" for key, value in _plain(last)]
        lines.append("")
    training = (_read(run / "config.json") or {}).get("training")
    if training:
        lines += ["Settings of the training:", "", "```json", json.dumps(training, indent=2), "```"]
    return lines or [f"The run {run.name} holds no figures."]


def _plain(values: dict[str, Any]) -> list[tuple[str, Any]]:
    """Numbers, also those one mapping deep."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [(f"{key} ({name})", number) for name, number in _plain(value)]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((key, value))
    return found


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected a mapping of names to values")
    return values


def upload(
    model: Any,
    repo_id: str,
    run: str | Path | None = None,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    tags: list[str] | None = None,
    max_shard_size: int | str = "50GB",
) -> str:
    """Write the model and its card to a repository; a card that is there already stays.

    Raises:
        IntegrationError: `huggingface_hub` is not installed.
        CheckpointError: the run cannot be read; nothing is uploaded then.
    """
    card = model_card(model, run, tags or [])
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise IntegrationError(f"huggingface_hub cannot be imported ({error}); install longscan[hub]") from error
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if not api.file_exists(repo_id, _CARD, revision=revision):
            write_text(Path(folder) / _CARD, card)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )
    return str(commit.commit_url)

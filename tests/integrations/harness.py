"""A small model in two formats, a tokenizer and tasks on disk, for tests of the evaluation harness."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from longscan.models import LanguageModel, LanguageModelConfig

END = "<|endoftext|>"
WORDS = [
    "the",
    "a",
    "small",
    "big",
    "dog",
    "cat",
    "river",
    "stone",
    "walks",
    "runs",
    "sleeps",
    "under",
    "cold",
    "it was",
]

_TASKS: dict[str, dict[str, Any]] = {
    "animals": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "goes_on": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["cold"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def write_tasks(folder: Path, rename: dict[str, str] | None = None, documents: int = 12) -> Path:
    """Task files that the harness reads without a network; ``rename`` gives some of them other names."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines = []
    for _ in range(documents):
        choices = [sentence(draw, 1, 4) for _ in range(4)]
        line = {"question": sentence(draw, 3, 30), "choices": choices, "answer": draw.randrange(4)}
        lines.append(json.dumps({**line, "text": sentence(draw, 20, 120)}))
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    for name, task in _TASKS.items():
        name = (rename or {}).get(name, name)
        values = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
            **task,
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    return folder


def write_tokenizer(folder: Path) -> int:
    """A trained byte-pair tokenizer, also for Transformers; returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    draw = random.Random(1)
    tokenizer.train_from_iterator([sentence(draw, 5, 20) for _ in range(200)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return tokenizer.get_vocab_size()


def write_model(folder: Path) -> LanguageModel:
    """The same random weights as ``ours`` and ``theirs`` (Transformers), each with the tokenizer."""
    vocabulary = write_tokenizer(folder / "ours")
    write_tokenizer(folder / "theirs")
    torch.manual_seed(0)
    config = LanguageModelConfig(d_model=32, n_layer=2, vocab_size=vocabulary, pad_vocab_size_multiple=1)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "ours")
    model.save_pretrained(folder / "theirs", format="transformers")
    return model

"""The model of the evaluation harness against the harness's own, on the same weights and tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.registry import Registry, get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from longscan.errors import ArgumentError, ConfigError
from longscan.integrations.lm_eval import LongscanLM, _tokenizer_of
from longscan.models import LanguageModel
from tests.integrations.harness import END, write_model, write_tasks
from tests.models.small import make

TASKS = ["animals", "last_word", "whole_text", "goes_on"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("harness")
    write_model(place)
    write_tasks(place / "tasks")
    return place


@pytest.fixture(scope="module")
def ours(place: Path) -> LongscanLM:
    return LongscanLM(str(place / "ours"), device="cpu")


@pytest.fixture(scope="module")
def theirs(place: Path) -> Any:
    return HFLM(str(place / "theirs"), device="cpu", dtype="float32", batch_size=4)


def evaluate(model: Any, place: Path, tasks: list[str] = TASKS, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
    assert results is not None
    return dict(results)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=given, task_name="made up") for given in arguments]


@pytest.mark.parametrize("shots", [0, 2])
def test_agrees_with_the_hf_model(ours: LongscanLM, theirs: Any, place: Path, shots: int) -> None:
    tasks = TASKS if shots == 0 else ["animals"]
    mine, other = (evaluate(model, place, tasks, num_fewshot=shots) for model in (ours, theirs))
    for task in tasks:
        for left, right in zip(responses(mine, task), responses(other, task), strict=True):
            compare(left, right)
        for name, value in other["results"][task].items():
            if name.endswith(",none") and isinstance(value, float):
                assert mine["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)


def compare(left: Any, right: Any) -> None:
    if isinstance(right, (list, tuple)):
        assert len(left) == len(right)
        for one, two in zip(left, right, strict=True):
            compare(one, two)
    elif isinstance(right, float):
        # Some units in float32's last place: 1.6e-7 was seen.
        assert left == pytest.approx(right, rel=1e-6, abs=1e-6)
    else:
        assert left == right


def test_short_windows_agree(place: Path) -> None:
    """Contexts cut on the left, documents scored window by window."""
    mine = LongscanLM(str(place / "ours"), device="cpu", max_length=20)
    other = HFLM(str(place / "theirs"), device="cpu", dtype="float32", batch_size=4, max_length=20)
    tasks = ["animals", "whole_text"]
    left, right = (evaluate(model, place, tasks) for model in (mine, other))
    for task in tasks:
        compare(responses(left, task), responses(right, task))


def test_empty_contexts_and_spaces_agree(ours: LongscanLM, theirs: Any) -> None:
    asked = requests(("", "the dog"), ("", END + " the"), ("a cat ", "walks"), ("a cat", " walks"), ("x", "€ Å\n"))
    compare(ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True))
    texts = requests(("",), ("the",), ("the dog runs over a stone " * 9,))
    compare(ours.loglikelihood_rolling(texts, disable_tqdm=True), theirs.loglikelihood_rolling(texts))


def test_greedy_text_agrees_and_stops(ours: LongscanLM, theirs: Any) -> None:
    options = {"until": [], "max_gen_toks": 16}
    contexts = ["the dog", "a small cat sleeps under", "it was"]
    asked = requests(*[(context, dict(options)) for context in contexts])
    free = ours.generate_until(asked, disable_tqdm=True)
    assert free == theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(free)) == 3
    stop = free[0][3:6]
    stopped = ours.generate_until(requests(("the dog", {**options, "until": [stop]})), disable_tqdm=True)
    assert stopped == [free[0][: free[0].index(stop)]]


def test_sampling_follows_its_seed(ours: LongscanLM) -> None:
    def sample(seed: int, **more: Any) -> list[str]:
        options = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "seed": seed, **more}
        return ours.generate_until(requests(("the dog", options), ("a", options)), disable_tqdm=True)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy = ours.generate_until(requests(("the dog", {"max_gen_toks": 8}), ("a", {"max_gen_toks": 8})))
    assert sample(1, top_k=1) == greedy


def test_without_a_bound_a_document_is_one(place: Path) -> None:
    text = "the dog runs over a stone " * 40
    whole = LongscanLM(str(place / "ours"), device="cpu", max_length=None, tokens_per_pass=50)
    wide = LongscanLM(str(place / "ours"), device="cpu", max_length=4000)
    (left,), (right,) = (model.loglikelihood_rolling(requests((text,)), disable_tqdm=True) for model in (whole, wide))
    assert left == pytest.approx(right, rel=1e-5)


def test_byte_models_need_no_tokenizer(place: Path) -> None:
    model = make(vocab_size=256)
    harness = LongscanLM(model)
    assert harness.tok_encode("dé") == [100, 0xC3, 0xA9]
    assert harness.prefix_token_id == harness.eot_token_id == 0
    results = evaluate(harness, place)
    assert 0 <= results["results"]["animals"]["acc,none"] <= 1


def test_options(place: Path) -> None:
    folder = str(place / "ours")
    bold = LongscanLM(folder, device="cpu", add_bos_token=True, prefix_token_id=3, dtype="bfloat16", batch_size=2)
    assert bold.tok_encode("the")[0] == 3
    assert bold.tok_encode("the", add_special_tokens=False)[0] != 3
    (nats, _), _ = bold.loglikelihood(requests(("the dog", " runs"), ("a", " cat")), disable_tqdm=True)
    reference = LongscanLM(str(place), subfolder="ours", device="cpu", add_bos_token=True, prefix_token_id=3)
    ((close, _),) = reference.loglikelihood(requests(("the dog", " runs")), disable_tqdm=True)
    assert nats == pytest.approx(close, rel=0.05)
    assert bold.device == torch.device("cpu")


def test_errors_say_what_is_wrong(ours: LongscanLM, place: Path) -> None:
    small = make()
    with pytest.raises(ArgumentError, match="tokenizer: this model has none"):
        LongscanLM(small)
    with pytest.raises(ArgumentError, match="outside the model's vocabulary"):
        LongscanLM(small, tokenizer=str(place / "ours"), prefix_token_id=300)
    with pytest.raises(ArgumentError, match="dtype must be"):
        LongscanLM(small, dtype="int8")
    with pytest.raises(ArgumentError, match="max_length"):
        LongscanLM(str(place / "ours"), device="cpu", max_length=3).loglikelihood(
            requests(("a", " cat sleeps under a big cold stone")), disable_tqdm=True
        )
    with pytest.raises(ArgumentError, match="new tokens"):
        ours.generate_until(requests(("a", {"max_gen_toks": 5000})), disable_tqdm=True)
    with pytest.raises(ConfigError, match="typical_p"):
        ours.generate_until(requests(("a", {"typical_p": 0.5})), disable_tqdm=True)


def test_a_run_of_ours_names_its_tokenizer(place: Path) -> None:
    model = make(vocab_size=256)
    folder = model.save_pretrained(place / "run")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(f'{{"model": {config}, "text": {{"tokenizer": "bytes"}}}}')
    assert LongscanLM(str(folder), device="cpu").tok_encode("a") == [97]
    folder = model.save_pretrained(place / "for-mamba-ssm", format="mamba-ssm")
    assert LongscanLM(str(folder), device="cpu").tok_encode("a") == [97]


def test_released_models_have_a_tokenizer_they_do_not_name(tmp_path: Path) -> None:
    folder = make(vocab_size=50277, n_layer=1).save_pretrained(tmp_path, format="mamba-ssm")
    model = LanguageModel.from_pretrained(folder)
    assert _tokenizer_of(str(folder), model) == "EleutherAI/gpt-neox-20b"


def test_the_entry_point() -> None:
    """Versions of the harness that look for plug-ins register this before anything of ours is imported."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    registry = Registry("model", base_cls=LM)
    registry.register("longscan", target=project["entry-points"]["lm_eval.models"]["longscan"])
    assert registry.get("longscan") is LongscanLM
    # Registered again, as it does itself when it is imported.
    assert registry.register("longscan")(LongscanLM) is get_model("longscan")


def test_the_harness_s_own_command(place: Path) -> None:
    out = place / "out"
    command = [sys.executable, "-m", "longscan.integrations.lm_eval", "--model", "longscan", "--device", "cpu"]
    command += ["--model_args", f"pretrained={place / 'ours'},max_length=64", "--tasks", "animals,goes_on"]
    command += ["--include_path", str(place / "tasks"), "--output_path", str(out), "--limit", "4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "acc_norm" in result.stdout
    assert list(out.rglob("results_*.json"))

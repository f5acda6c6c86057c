"""`longscan reproduce`, from the file of an experiment to its result, in one piece and in several."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longscan.cli import main
from longscan.cli.config import read_toml
from longscan.cli.reproduce import Options, run
from longscan.errors import CheckpointError, ConfigError, StorageError
from longscan.experiments import Result, Run, read_results, read_settings
from longscan.experiments.report import duration, results_page
from longscan.nn.storage import load_tensors
from longscan.tasks.dna_standin import DNASpeciesStandin
from longscan.tasks.task import ACCURACY, BITS_PER_BYTE, NRMSE
from tests.tasks.test_digits import write_digits

EXPERIMENT = """
title = "Small heads"
task = "induction_heads"
published = "table-1"
[here]
[paper]
cost = "a second"
task = { length = 16, vocab = 6 }
recipe = { d_model = 16, n_layer = 1, steps = 12, batch_size = 4 }
lengths = [16, 32]
sequences = 8
[systems.mamba]
label = "Mamba"
[systems.attention]
longest = 16
"""
PUBLISHED = """
[table-1]
source = "Someone 2001, table 1"
figures.mamba = { 16 = 99.5 }
"""


percent = ACCURACY.number


@pytest.fixture
def options(tmp_path: Path) -> Options:
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "small_heads.toml").write_text(EXPERIMENT)
    (folder / "published.toml").write_text(PUBLISHED)
    (folder / "text.toml").write_text("device = 'cpu'\n")
    return Options(
        name="small-heads",
        device="cpu",
        scale="paper",
        experiments=folder,
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        docs=tmp_path / "results.md",
    )


def told(options: Options, **changes: object) -> tuple[int, str]:
    import dataclasses

    console = Console(file=io.StringIO(), width=150, highlight=False)
    code = run(dataclasses.replace(options, **changes), console)  # type: ignore[arg-type]
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def results(options: Options) -> dict[str, Result]:
    return {result.system: result for result in read_results(options.results)}


def test_from_the_file_to_the_page(options: Options) -> None:
    code, text = told(options)
    assert code == 0
    found = results(options)
    mamba = found["mamba"]
    assert set(mamba.figures) == {"16", "32"}
    assert set(found["attention"].figures) == {"16"}
    assert mamba.steps == 12
    assert mamba.curve[-1][0] == 12
    assert mamba.machine["cpu"] in mamba.device
    assert mamba.versions["torch"]
    assert mamba.parameters > 1000
    assert f"{percent(mamba.figures['16'])} (99.5)" in text
    assert "Someone 2001" in text
    assert (options.results / "small_heads" / "paper.png").stat().st_size > 1000
    code, text = told(options, report=True, name=None)
    page = options.docs.read_text()
    # In the order of the experiment's file.
    assert page.index("\n| Mamba |") < page.index("\n| attention |")
    assert f"| Mamba | {percent(mamba.figures['16'])} (99.5) | {percent(mamba.figures['32'])} |" in page
    assert "## Small heads, scale: paper" in page
    assert "| [Small heads](#small-heads-scale-paper) | paper | 2 |" in page
    figure = re.search(r"!\[Small heads, scale: paper\]\((.*)\)", page)
    assert figure is not None
    assert (options.docs.parent / figure[1]).resolve() == (options.results / "small_heads" / "paper.png").resolve()
    assert "measured: " in told(options, list=True, name=None)[1]


def test_another_scale_is_not_held_against_what_was_published(options: Options) -> None:
    text = EXPERIMENT.replace("[here]", "[x]").replace("[paper]", "[here]").replace("[x]", "[paper]")
    (options.experiments / "small_heads.toml").write_text(text)
    code, shown = told(options, scale="here", only="mamba")
    assert code == 0
    assert "99.5" not in shown
    told(options, report=True, name=None)
    assert "99.5" not in options.docs.read_text()


def test_pieces_make_the_whole(options: Options, tmp_path: Path) -> None:
    told(options, only="mamba")
    whole = results(options)["mamba"]
    other = {"only": "mamba", "runs": tmp_path / "pieces", "results": tmp_path / "pieced"}
    for _ in range(100):
        code, text = told(options, minutes=0.0, **other)
        assert code == 0
        if "the same command goes on" not in text:
            break
        assert "stopped" in text
    (pieced,) = read_results(tmp_path / "pieced")
    assert pieced.curve == whole.curve
    assert pieced.figures == whole.figures


def test_a_finished_run_is_not_done_again(options: Options) -> None:
    told(options, only="mamba")
    before = results(options)["mamba"]
    told(options, only="mamba")
    assert results(options)["mamba"].curve == before.curve


def test_other_settings_do_not_go_on(options: Options) -> None:
    told(options, only="mamba", minutes=0.0)
    file = options.experiments / "small_heads.toml"
    file.write_text(EXPERIMENT.replace("batch_size = 4", "batch_size = 5"))
    with pytest.raises(CheckpointError, match="made with other settings"):
        told(options, only="mamba")


def test_words_for_what_is_not_there(options: Options) -> None:
    with pytest.raises(ConfigError, match=r"no experiment 'large_heads'.*small_heads"):
        told(options, name="large-heads")
    with pytest.raises(ConfigError, match="small_heads has no 'lstm', it has mamba, attention"):
        told(options, only="lstm")
    with pytest.raises(ConfigError, match="name an experiment"):
        told(options, name=None)
    (options.results / "small_heads").mkdir(parents=True)
    (options.results / "small_heads" / "mamba-paper-seed0.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(StorageError, match="is no result"):
        told(options, report=True)


def test_the_command_line_knows_it(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reproduce", "--list", "--experiments", str(options.experiments), "--results", str(options.results)]
    assert main(arguments) == 0
    assert "small-heads" in capsys.readouterr().out


def test_away_from_a_checkout_it_says_where_experiments_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--list"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_several_sizes(options: Options) -> None:
    sizes = "[paper.sizes]\ns = { d_model = 8, steps = 2 }\nl = { d_model = 12, steps = 2 }\n[systems.mamba]"
    (options.experiments / "small_heads.toml").write_text(EXPERIMENT.replace("[systems.mamba]", sizes))
    assert told(options, only="mamba,attention-s")[0] == 0
    assert set(results(options)) == {"mamba-s", "mamba-l", "attention-s"}
    large = results(options)["mamba-l"]
    assert (large.family, large.size, large.label) == ("mamba", "l", "Mamba l")
    assert large.parameters > results(options)["mamba-s"].parameters
    assert (options.results / "small_heads" / "paper.png").stat().st_size > 1000
    told(options, sizes="l")
    assert set(results(options)) == {"mamba-s", "mamba-l", "attention-s", "attention-l"}
    assert "4 of 4: attention, mamba" in told(options, list=True, name=None)[1]
    with pytest.raises(ConfigError, match="--sizes: small_heads has no 'xl', it has s, l"):
        told(options, sizes="xl")
    with pytest.raises(ConfigError, match="--only: small_heads has no 'lstm', it has mamba, attention"):
        told(options, only="lstm")


def test_many_variants_stand_below_one_another(options: Options) -> None:
    variants = "".join(f"[systems.v{n}]\nmixer = 'mamba'\nlabel = 'variant {n}'\n" for n in range(11))
    text = EXPERIMENT[: EXPERIMENT.index("[systems.mamba]")].replace("lengths = [16, 32]", "lengths = [16]")
    (options.experiments / "small_heads.toml").write_text(text.replace("steps = 12", "steps = 1") + variants)
    (options.experiments / "published.toml").write_text(PUBLISHED.replace("figures.mamba", "figures.v7"))
    code, shown = told(options)
    assert code == 0
    (row,) = (line for line in shown.splitlines() if line.strip().startswith("variant 7 "))
    assert row.endswith(f"{percent(results(options)['v7'].figures['16'])} (99.5) ")
    assert (options.results / "small_heads" / "paper.png").stat().st_size > 1000


def test_figures_as_one_says_them() -> None:
    assert [percent(share) for share in (1.0, 0.99999, 0.123)] == ["100.0", "99.9+", "12.3"]
    assert ACCURACY.text(0.5) == "50.0%"
    assert BITS_PER_BYTE.text(1.2345) == "1.234"
    assert NRMSE.text(NRMSE.score(1.0, 4.0)) == "50.00%"
    assert NRMSE.number(0.99999) == "100.00"
    assert ACCURACY.reaches(0.9, 0.8)
    assert not NRMSE.reaches(0.9, 0.8)
    assert [duration(s) for s in (5, 600, 9000)] == ["5 s", "10 min", "2.5 h"]


def test_selective_copying_shows_what_the_selection_does(options: Options) -> None:
    text = EXPERIMENT.replace('"induction_heads"', '"selective_copying"').replace(
        "length = 16, ", "tokens = 2, length = 16, "
    )
    (options.experiments / "small_heads.toml").write_text(text)
    told(options, only="mamba")
    for name in ("selection", "states"):
        assert (options.results / "small_heads" / f"{name}-paper.png").stat().st_size > 1000


def test_induction_heads_show_what_is_remembered(options: Options) -> None:
    told(options, only="mamba")
    assert (options.results / "small_heads" / "memory-mamba-paper.png").stat().st_size > 10_000
    assert "way of its own" not in results_page(read_results(options.results), {})


def test_files_of_earlier_versions_are_read(options: Options) -> None:
    told(options, only="mamba")
    (new,) = read_results(options.results)
    path = next(options.results.glob("*/*.json"))
    values = json.loads(path.read_text())
    values["accuracy"] = values.pop("figures")
    del values["metric"], values["axis"]
    path.write_text(json.dumps(values))
    (old,) = read_results(options.results)
    assert old == new


def test_checkpoints_of_earlier_versions_go_on(options: Options) -> None:
    settings = read_settings("small_heads", read_toml(options.experiments / "small_heads.toml"), "paper")
    run = Run(settings, settings.systems["mamba"], seed=0, device=torch.device("cpu"), folder=options.runs)
    run.resume()
    point = run._trainer.advance(4)  # type: ignore[union-attr]
    task = {"name": "induction_heads", "length": 16, "vocab": 6}
    recipe = {"d_model": 16, "n_layer": 1, "batch_size": 4, "learning_rate": 1e-3}
    about = {
        "settings": {"task": task, "mixer": "mamba", "recipe": recipe, "seed": 0},
        "curve": [[4, point.loss, point.figure]],
        "accuracy": {},
        "train_seconds": 1.0,
        "test_seconds": 0.0,
    }
    run._trainer.save(run.path, about)  # type: ignore[union-attr]
    again = Run(settings, settings.systems["mamba"], seed=0, device=torch.device("cpu"), folder=options.runs)
    assert again.resume() == 4
    assert again.go_on(lambda: False, lambda point, figures: None)
    assert set(again.figures) == {"16", "32"}


def test_enough_at_a_shorter_length_is_not_enough(options: Options) -> None:
    text = EXPERIMENT.replace("batch_size = 4", "batch_size = 4, lengths = [4, 8], passed = 0.0")
    (options.experiments / "small_heads.toml").write_text(text)
    settings = read_settings("small_heads", read_toml(options.experiments / "small_heads.toml"), "paper")
    # Every figure is enough.
    settings = dataclasses.replace(settings, until=-1.0)
    run = Run(settings, settings.systems["mamba"], seed=0, device=torch.device("cpu"), folder=options.runs)
    run.resume()
    assert not run.go_on(lambda: True, lambda point, figures: None)
    assert len(run.curve) == 1
    again = Run(settings, settings.systems["mamba"], seed=0, device=torch.device("cpu"), folder=options.runs)
    again.resume()
    assert not again.trained
    assert again.go_on(lambda: False, lambda point, figures: None)
    assert len(again.curve) == 3
    result = again.result()
    assert "Mamba: lengths 4, 8 first." in results_page([result], {})
    patient = dataclasses.replace(result, recipe={**result.recipe, "patience": 2000})
    assert "Mamba: lengths 4, 8 first, at most 2,000 steps each." in results_page([patient], {})


def test_trainings_beside_one_another_are_said_to_be(options: Options) -> None:
    told(options, only="mamba", sharing=8)
    (result,) = read_results(options.results)
    assert result.sharing == 8
    assert f"| {result.device}, one of 8 at a time, " in results_page([result], {})
    shown = " ".join(told(options, list=True, name=None)[1].split())
    assert f"a system on {result.device.partition(',')[0]} beside others" in shown


def test_data_are_where_one_says(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digits(tmp_path / "mnist")
    text = EXPERIMENT.replace("induction_heads", "sequential_digits").replace("length = 16, vocab = 6", "length = 16")
    (options.experiments / "small_digits.toml").write_text(text.replace("lengths = [16, 32]", ""))
    told(options, name="small-digits", only="mamba", data=str(tmp_path / "mnist"))
    (result,) = read_results(options.results, "small_digits")
    assert result.sequences == 5
    assert 5 * result.figures["16"] == pytest.approx(round(5 * result.figures["16"]))
    drawn = ["plot", "task", "small-heads", "--experiments", str(options.experiments), "--output", str(tmp_path)]
    assert main([*drawn, "--scale", "paper"]) == 0
    assert (tmp_path / "samples" / "small_heads.png").stat().st_size > 5000
    assert main(["plot", "task", "small-hats", "--experiments", str(options.experiments)]) == 2
    assert "allowed are an experiment" in capsys.readouterr().err


def test_the_best_possible_stands_beside(options: Options, tmp_path: Path) -> None:
    text = EXPERIMENT.replace("induction_heads", "dna_species_standin").replace("vocab = 6", "sequences = 20")
    (options.experiments / "small_heads.toml").write_text(text)
    console = Console(file=io.StringIO(), width=120)
    assert run(dataclasses.replace(options, only="mamba", scale="paper"), console) == 0
    (result,) = read_results(options.results)
    task = DNASpeciesStandin(16, sequences=20)
    assert result.best == {"16": task.best(16, 8, 0), "32": task.best(32, 8, 0)}
    assert "the best possible" in console.file.getvalue()  # type: ignore[attr-defined]
    row = f"| *the best possible* | {percent(result.best['16'])} | {percent(result.best['32'])} |"
    assert row in results_page([result], {})


def test_costs_are_measured_where_there_are_results(options: Options) -> None:
    assert "a second" in told(options, list=True, name=None)[1]
    told(options, only="mamba")
    text = " ".join(told(options, list=True, name=None)[1].split())
    assert "measured: " in text
    assert "a second" in text
    told(options)
    text = " ".join(told(options, list=True, name=None)[1].split())
    assert "measured: " in text
    assert "a second" not in text


def test_one_experiment_lists_its_systems(options: Options) -> None:
    told(options, only="mamba")
    (result,) = read_results(options.results)
    text = " ".join(told(options, list=True)[1].split())
    assert f"mamba Mamba {percent(result.figures['16'])}%, 32: {percent(result.figures['32'])}%" in text
    assert "attention attention 12 steps to do" in text


def test_what_takes_time_is_told(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal as lines; here each is due at once."""
    from longscan.cli import reproduce

    monkeypatch.setattr(reproduce, "_INTERVAL", -1.0)
    text = EXPERIMENT.replace('"induction_heads"', '"dna_standin"').replace("length = 16, vocab = 6", "length = 16")
    (options.experiments / "small_heads.toml").write_text(
        text.replace("length = 16 }", "length = 16, sequences = 20 }")
    )
    _, shown = told(options, only="mamba")
    assert "Mamba: drawing sequences, 0 of 4" in shown
    assert "Mamba: drawing sequences, 4 of 4" in shown
    assert "Mamba: testing at length 32, 0 of 8" in shown
    assert "step 12/12" in shown
    assert "0 s left" in shown


def test_pretrained_systems_start_from_what_was_trained(options: Options) -> None:
    base = EXPERIMENT.replace('"induction_heads"', '"dna_standin"').replace("vocab = 6", "sequences = 20")
    (options.experiments / "next_base.toml").write_text(base.replace("[16, 32]", "[16]"))
    after = base.replace('"dna_standin"', '"dna_species_standin"').replace("longest = 16", "")
    after = after.replace("[systems.mamba]", '[systems.mamba]\npretrained = "next_base/mamba"')
    (options.experiments / "species.toml").write_text(
        after.replace("steps = 12", 'model_options = { norm = "rms" }, steps = 1')
    )
    species = {"name": "species", "only": "mamba"}
    with pytest.raises(CheckpointError, match="first: longscan reproduce next-base --only mamba --scale paper"):
        told(options, **species)
    told(options, name="next-base", only="mamba")
    told(options, **species)
    (before,) = read_results(options.results, "next_base")
    (found,) = read_results(options.results, "species")
    assert found.pretrained == "next_base/mamba"
    assert before.pretrained == ""
    theirs, _ = load_tensors(options.runs / "next_base" / "mamba-paper-seed0" / "checkpoint.safetensors")
    ours, _ = load_tensors(options.runs / "species" / "mamba-paper-seed0" / "checkpoint.safetensors")
    embedding = theirs["model/backbone.embedding.weight"][:5]
    # One step further on.
    moved = (ours["model/encoder.weight"] - embedding).abs().max()
    assert 0 < moved < 1.5e-3
    # A finished run is not started anew.
    told(options, **species)
    assert read_results(options.results, "species")[0].curve == found.curve

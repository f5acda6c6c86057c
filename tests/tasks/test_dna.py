"""DNA: files are read to the base, strands are each other's complement, and what is best possible is that."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.errors import ArgumentError, DataError
from longscan.evaluation.tasks import evaluate_task
from longscan.tasks.dna import DNA, DNASpecies, encode, read_fasta, reverse_complement, shifted
from longscan.tasks.dna_standin import DNASpeciesStandin, DNAStandin, Species, synthetic_species
from longscan.tasks.task import IGNORED, PERPLEXITY, Recipe
from longscan.training.tasks import TaskTrainer, task_model

CPU = torch.device("cpu")
RECIPE = Recipe(d_model=24, n_layer=2, steps=100, batch_size=16, learning_rate=1e-2)


def write_genome(path: Path, bases: str) -> None:
    """A first record of all but the last hundred bases, 60 a line, and a second of those."""
    lines = [bases[k : k + 60] for k in range(0, len(bases) - 100, 60)]
    text = "\n".join([">one first of two", *lines, ">two", bases[-100:], ""])
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def genomes(tmp_path: Path) -> list[str]:
    """Two, of 1,300 bases each, one of A and C, the other of G and T."""
    pytest.importorskip("Bio")
    random = np.random.default_rng(0)
    files = [str(tmp_path / "ac.fa"), str(tmp_path / "gt.fna.gz")]
    for file, pair in zip(files, ("AC", "GT"), strict=True):
        write_genome(Path(file), "".join(random.choice(list(pair), 1300)))
    return files


def test_fasta_files_are_read_to_the_base(tmp_path: Path) -> None:
    pytest.importorskip("Bio")
    text = ">chr1 the first\nACGT\nnacgtR\n\n>chr2\nTT\n"
    for name, content in (("a.fa", text.encode()), ("a.fa.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        records = read_fasta(tmp_path / name)
        assert [record.tolist() for record in records] == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [3, 3]]


def test_the_other_strand() -> None:
    tokens = torch.from_numpy(encode("AACGTN")).long()
    assert reverse_complement(tokens).tolist() == encode("NACGTT").tolist()
    assert torch.equal(reverse_complement(reverse_complement(tokens)), tokens)


def test_an_unknown_base_is_not_asked_for() -> None:
    inputs, targets = shifted(torch.from_numpy(encode("ACNG")).long()[None])
    assert inputs.tolist() == [[0, 1, 4]]
    assert targets.tolist() == [[1, IGNORED, 2]]


@pytest.mark.parametrize("strands", [False, True])
def test_windows_to_train_on_are_of_the_file_and_of_either_strand(genomes: list[str], strands: bool) -> None:
    task = DNA(20, ",".join(genomes), strands)
    inputs, targets = task.sample(300, torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, 1:].masked_fill(inputs[:, 1:] == 4, IGNORED), targets[:, :-1])
    # By the end of a record that is to train on stands an N.
    train = [np.append(r[: len(r) - round(0.05 * len(r))], 4) for file in genomes for r in read_fasta(Path(file))]
    whole = np.concatenate(train).astype(np.uint8)
    other = reverse_complement(torch.from_numpy(whole).long()).numpy().astype(np.uint8)
    rows = inputs.numpy().astype(np.uint8)
    ahead = [row.tobytes() in whole.tobytes() for row in rows]
    back = [row.tobytes() in other.tobytes() for row in rows]
    assert all(a or b for a, b in zip(ahead, back, strict=True))
    assert (90 < sum(back) < 210) if strands else all(ahead)


def test_what_is_held_out_is_the_end_of_every_record(genomes: list[str]) -> None:
    task = DNA(9, ",".join(genomes))
    batches = list(task.tests(9, 3, 2, CPU, 0))
    assert [len(inputs) for inputs, _ in batches] == [2, 1]
    rest = np.concatenate(
        [np.append(r[len(r) - round(0.05 * len(r)) :], 4) for f in genomes for r in read_fasta(Path(f))]
    )
    starts = [k * ((len(rest) - 10) // 2) for k in range(3)]
    assert torch.cat([inputs for inputs, _ in batches]).tolist() == [rest[s : s + 9].tolist() for s in starts]


def test_a_species_is_a_file(genomes: list[str]) -> None:
    task = DNASpecies(30, ",".join(genomes), strands=False)
    assert (task.outputs, task.chance) == (2, 0.5)
    inputs, targets = task.sample(200, torch.Generator().manual_seed(0))
    assert 70 < int(targets.sum()) < 130
    for row, species in zip(inputs, targets.tolist(), strict=True):
        assert set(row.tolist()) <= {4, *((0, 1), (2, 3))[species]}
    batches = list(task.tests(30, 4, 3, CPU, 0))
    assert torch.cat([theirs for _, theirs in batches]).tolist() == [0, 0, 1, 1]


def test_what_is_wrong_is_said(genomes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing"):
        DNA(9, str(tmp_path / "nothing.fa")).to(CPU)
    (tmp_path / "text.fa").write_text("ACGT\n")
    with pytest.raises(DataError, match="has no bases"):
        DNA(9, str(tmp_path / "text.fa")).to(CPU)
    with pytest.raises(DataError, match="part to train on has 1,237 places, windows are of 5,001"):
        DNASpecies(5000, ",".join(genomes)).to(CPU)
    with pytest.raises(DataError, match="held-out part has 67 places, windows are of 70"):
        list(DNASpecies(20, ",".join(genomes)).tests(70, 4, 2, CPU, 0))
    with pytest.raises(ArgumentError, match="species must be at least 2"):
        DNAStandin(species=1)
    with pytest.raises(ArgumentError, match="to train on are of 16 bases, got length 17"):
        DNAStandin(16, sequences=4).sample(2, torch.Generator(), 17)
    monkeypatch.setitem(sys.modules, "Bio.SeqIO.FastaIO", None)
    with pytest.raises(DataError, match=r"biopython.*longscan\[experiments\]"):
        DNA(9, genomes[0]).to(CPU)


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    species = dataclasses.replace(synthetic_species(1)[0], marker=(0, 1), repeat=2)
    sequences = np.array(list(itertools.product(range(4), repeat=7)), np.uint8)
    assert np.exp(species.log_likelihood(sequences)).sum() == pytest.approx(1, abs=1e-12)


def test_sequences_are_drawn_by_the_rule() -> None:
    """Against a second definition of the rule, in plain Python, and by counting."""
    chances = np.random.default_rng(1).dirichlet(np.ones(4), 16)
    species = Species(chances, marker=(1, 2), repeat=3, mutation=0.1)
    sequences = np.empty((400, 60), np.uint8)
    species.draw(sequences, np.random.default_rng(2))
    for row in sequences[:20].tolist():
        total, until, source, last = 0.0, 0, 0, None
        for t, base in enumerate(row):
            repeated = t < until
            before = [0, 0, *row[:t]][-2:]
            chance = chances[4 * before[0] + before[1], base]
            if repeated:
                chance = 0.025 + 0.9 * (base == row[source + t - until + 3])
            total += math.log(chance)
            if not repeated and row[max(0, t - 1) : t + 1] == [1, 2]:
                if last is not None:
                    until, source = t + 4, last
                last = t + 1
        assert species.log_likelihood(np.array([row], np.uint8))[0] == pytest.approx(total)
    first = np.bincount(sequences[:, 0], minlength=4) / len(sequences)
    assert np.abs(first - chances[0]).max() < 0.08


def test_the_best_possible_is_of_the_mixture() -> None:
    task, length, sequences = DNAStandin(12, species=3, sequences=6), 12, 7
    bases = torch.cat([torch.cat([inputs, targets[:, -1:]], 1) for inputs, targets in task.tests(12, 7, 3, CPU, 5)])
    assert bases.shape == (7, 13)
    nats = 0.0
    for row in bases.numpy().astype(np.uint8):
        posterior = np.ones(3)
        for t in range(13):
            joint = [np.exp(one.log_likelihood(row[None, : t + 1])[0]) for one in synthetic_species(3)]
            if t:
                nats -= math.log(sum(joint) / posterior.sum())
            posterior = np.array(joint)
    assert task.best(length, sequences, 5) == pytest.approx(math.exp(nats / (7 * 12)))


def test_longer_contexts_and_sequences_say_more() -> None:
    perplexities = [DNAStandin().best(length, 100, 0) for length in (32, 256, 2048)]
    assert 4 > perplexities[0] > perplexities[1] > perplexities[2] > 2.5
    shares = [DNASpeciesStandin().best(length, 100, 0) for length in (32, 256, 2048)]
    assert 0.2 <= shares[0] < shares[1] < shares[2] <= 1


def test_training_and_testing_see_different_sequences() -> None:
    task = DNASpeciesStandin(40, sequences=200)
    seen = {row.numpy().tobytes() for row in task.sample(200, torch.Generator().manual_seed(0))[0]}
    for inputs, species in task.tests(40, 50, 20, CPU, 0):
        assert not seen & {row.numpy().tobytes() for row in inputs}
        assert inputs.shape[0] == len(species)
    assert len(seen) > 80


def test_a_model_learns_something_but_not_more_than_there_is() -> None:
    task = DNAStandin(64, 2, 500)
    model = task_model(task, "s4d", RECIPE, seed=0, device=CPU)
    ours = TaskTrainer(task, model, RECIPE, seed=1, device=CPU)
    ours.advance(100)
    figure = evaluate_task(model, task, length=64, sequences=200)
    best = task.best(64, 200, 0)
    assert best < figure < 0.9 * task.chance


def test_perplexity_is_of_the_mean() -> None:
    assert PERPLEXITY.score(3 * math.log(4), 3) == pytest.approx(4)
    assert PERPLEXITY.text(2.8621) == "2.862"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["standin", "species"])
def test_windows_are_drawn_within_a_captured_step(genomes: list[str], kind: str) -> None:
    device = torch.device("cuda")
    task = DNAStandin(64, 2, 50) if kind == "standin" else DNASpecies(64, ",".join(genomes))
    losses = []
    for capture in (True, False):
        model = task_model(task, "s4d", RECIPE, seed=0, device=device)
        trainer = TaskTrainer(task, model, RECIPE, seed=1, device=device, capture=capture)
        losses.append(trainer.advance(5).loss)
        assert (trainer._graph is not None) == capture
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

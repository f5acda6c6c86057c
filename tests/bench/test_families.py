"""The benchmark of Transformers' own models in miniature."""

from __future__ import annotations

import pytest

from longscan.bench import Settings, families
from longscan.bench.peers import huggingface

pytest.importorskip("transformers")


def test_it_runs_and_both_agree() -> None:
    report = families.run(Settings(shapes=((8, 16, 19, 2, 3),), dtypes=("float32",), repeats=1, budget=0.1))
    assert report.failed == []
    assert len(report.groups()) == 3
    for group in report.groups():
        ours, theirs, floor = report.of(group)
        assert (ours.contender, theirs.contender) == ("transformers+longscan", "transformers")
        for row in (ours, theirs):
            assert row.value is not None, row.note
            assert row.error is not None
            assert row.error < 1e-5
        assert floor.value is not None


def test_a_token_reads_what_it_needs() -> None:
    """Of a hybrid's weights the experts it does not pass are left out."""
    model = huggingface.of_family("jamba", 8, 16, 19)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    every = sum(p.numel() for p in model.parameters())
    untied = 19 * 16
    assert families.read_by_a_token(model, 1) == 4 * (every - untied - experts * 14 // 16)
    assert families.read_by_a_token(model, 100) == 4 * (every - untied)

"""The synthetic tasks by name; a new one is a file and a line here."""

from __future__ import annotations

from longscan.tasks.associative_recall import AssociativeRecall, MultiQueryAssociativeRecall
from longscan.tasks.copying import Copying
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.selective_copying import SelectiveCopying
from longscan.tasks.task import Task

#: Name in configurations -> class.
TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (SelectiveCopying, Copying, InductionHeads, AssociativeRecall, MultiQueryAssociativeRecall)
}

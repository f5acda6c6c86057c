"""The tasks by name; a new one is a file and a line here."""

from __future__ import annotations

from longscan.tasks.arena_standins import RetrievalStandin, ReviewsStandin, ShapesStandin
from longscan.tasks.associative_recall import AssociativeRecall, MultiQueryAssociativeRecall
from longscan.tasks.audio import Audio, NotesStandin
from longscan.tasks.byte_text import ByteText, Retrieval
from longscan.tasks.copying import Copying
from longscan.tasks.delay import Delay
from longscan.tasks.digits import DigitsStandin, PermutedDigits, PermutedDigitsStandin, SequentialDigits
from longscan.tasks.dna import DNA, DNASpecies
from longscan.tasks.dna_standin import DNASpeciesStandin, DNAStandin
from longscan.tasks.grey_images import GreyImages
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.language import Language
from longscan.tasks.listops import ListOps
from longscan.tasks.pathfinder import Pathfinder, PathX
from longscan.tasks.selective_copying import SelectiveCopying
from longscan.tasks.spoken_digits import SpokenDigitsClassesStandin, SpokenDigitsStandin
from longscan.tasks.task import Task
from longscan.tasks.trajectories import CharacterTrajectories, TrajectoriesStandin


def _by_name(*kinds: type[Task]) -> dict[str, type[Task]]:
    return {kind.name: kind for kind in kinds}


#: Small tasks of tokens with answers at the last places, whose data have no end.
SYNTHETIC = _by_name(SelectiveCopying, Copying, InductionHeads, AssociativeRecall, MultiQueryAssociativeRecall)

#: Name in configurations -> class.
TASKS = SYNTHETIC | _by_name(
    Language,
    SequentialDigits,
    PermutedDigits,
    DigitsStandin,
    PermutedDigitsStandin,
    Delay,
    CharacterTrajectories,
    TrajectoriesStandin,
    DNA,
    DNASpecies,
    DNAStandin,
    DNASpeciesStandin,
    Audio,
    NotesStandin,
    SpokenDigitsStandin,
    SpokenDigitsClassesStandin,
    ListOps,
    Pathfinder,
    PathX,
    ByteText,
    Retrieval,
    GreyImages,
    ReviewsStandin,
    RetrievalStandin,
    ShapesStandin,
)

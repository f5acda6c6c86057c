"""What a call hands over to the compiled step: int64 numbers, and the columns of the tables that they point to."""

from __future__ import annotations

from enum import IntEnum

# Sizes, then addresses (0: absent).
D_MODEL, D_INNER, D_STATE, DT_RANK, D_CONV, HEADS, VOCABULARY, BATCH, LAYERS = range(9)
HIDDEN, ASIDE, STREAMS, X, GATE, MIXED, DELTA, Y, OWN, OWN_SPAN, CLAIMED, DONE, PLAN = range(9, 22)
LOGITS, HEAD, HEAD_KIND, HEAD_SCALES, HEAD_BIAS, FINAL_NORM = range(22, 28)
ARGUMENTS = 28

# A layer is at most so many phases; its row of the plan is the number of the task that each begins with, and of the
# next layer's first.
PHASES = 4

# Blocks are multiples of so many channels (the widest vector) or rows.
CHANNEL_UNIT, ROW_UNIT = 16, 4

# A thread's own memory begins with the number of the layer whose norm it holds, in a cache line of its own.
OWN_HEADER = 64


class Layer(IntEnum):
    """What kind of layer a row of the table of weights is of."""

    MAMBA = 0
    MLP = 1
    EXPERTS = 2


class Field(IntEnum):
    """Columns of a Mamba layer; a kind is a value of `MATRIX_KINDS`, the address 0 stands for "none"."""

    LAYER = 0
    NORM = 1
    IN_PROJ = 2
    IN_PROJ_KIND = 3
    IN_PROJ_SCALES = 4
    IN_PROJ_BIAS = 5
    IN_PROJ_PAIRED = 6
    CONV = 7
    CONV_BIAS = 8
    X_PROJ = 9
    X_PROJ_KIND = 10
    X_PROJ_SCALES = 11
    SELECTION_NORM = 12
    DT_PROJ = 13
    DT_PROJ_KIND = 14
    DT_PROJ_SCALES = 15
    DT_BIAS = 16
    A = 17
    D = 18
    OUT_PROJ = 19
    OUT_PROJ_KIND = 20
    OUT_PROJ_SCALES = 21
    OUT_PROJ_BIAS = 22


class MlpField(IntEnum):
    """Columns of a gated MLP, of which there may be several, the experts, one behind the other in memory."""

    LAYER = 0
    NORM = 1
    GATE = 2
    GATE_KIND = 3
    GATE_SCALES = 4
    UP = 5
    UP_KIND = 6
    UP_SCALES = 7
    DOWN = 8
    DOWN_KIND = 9
    DOWN_SCALES = 10
    ROUTER = 11
    ROUTER_KIND = 12
    INTERMEDIATE = 13
    NUMBER = 14
    CHOSEN = 15


FIELDS = max(len(Field), len(MlpField))

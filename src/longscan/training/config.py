"""How to train, as one frozen dataclass that round-trips through JSON and TOML."""

from __future__ import annotations

import dataclasses
from typing import Literal

from longscan.errors import ConfigError

#: Options that say what each process has of the model: the losses are the same.
LAYOUT = ("parallel", "replicas", "sequence_parallel", "tensor_parallel")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Batches, optimiser, schedule and what is kept of a run."""

    steps: int | None = None
    """Optimiser steps. None: as many as fit in `minutes` on this machine, measured before training and then fixed."""
    minutes: float | None = None
    """Time for training and the final evaluation, if `steps` is not given."""
    passes: float | None = None
    """At most so many passes over the corpus, if `steps` is not given: a fast machine would learn it by heart."""
    batch_size: int = 16
    """Sequences per optimiser step, over all processes."""
    sequence_length: int = 256
    """Tokens per sequence."""
    accumulate: int = 1
    """Micro-batches that a process splits its part of the batch into, to save memory."""
    carry_state: bool = False
    """Rows of the batch read on from step to step and carry the state (truncated back-propagation)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon": Muon for the matrices of the layers, AdamW for everything else."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon (updates scaled by the root of rows/columns where that is above 1)."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms, biases, A_log and D have none."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Fall of the learning rate after the warm-up."""
    final_learning_rate: float = 0.0
    """Where the schedule ends, as a fraction of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 means no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16": matrix products under autocast; parameters, states and sums stay float32."""
    compile: bool = False
    """Compile the model as a whole with torch.compile."""
    compile_blocks: bool = False
    """Compile each residual block by itself: equal ones once, and the way with `parallel = "fsdp"`."""
    recompute: bool = False
    """Keep only the borders between layers and compute each layer again on the way back: less memory, a third more
    work."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes: "ddp": each has the whole model; "fsdp": parameters, gradients and what the optimiser keeps
    are split over them (FSDP2), a layer is whole only while it computes. The losses are the same."""
    gather_precision: Literal["float32", "bfloat16"] = "float32"
    """With `parallel = "fsdp"`: how parameters travel to a layer that computes. "bfloat16", if `precision` is: half of
    the bytes, but also what stays float32 otherwise, A, D and the bias of dt, is rounded while it computes."""
    replicas: int = 1
    """With `parallel = "fsdp"`: so many groups of neighbouring processes, each with all shards (hybrid sharding).
    Layers travel within a group, such as a machine; between groups only the gradients of the shards do."""
    cuda_graph: bool = True
    """On one GPU, capture forward and backward as a CUDA graph; without effect elsewhere and with `compile`."""
    sequence_parallel: int = 1
    """So many neighbouring processes share each sequence: each has a part of its length. It divides the processes and
    `sequence_length`, and not every mixer can (attention, of all tokens, sends keys and values)."""
    tensor_parallel: int = 1
    """So many neighbouring processes share each layer (Mamba, attention, gated MLPs): each has a part of its channels
    or heads, and all have the same tokens. It divides the processes."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    leave_out_bad_steps: bool = False
    """Leave out an update whose loss or gradient is no number, instead of stopping; the run stops after ten in a row.
    On a GPU every step then waits for it."""
    spike: float = 0.0
    """With `leave_out_bad_steps`: leave out too what has a gradient so many times larger than usual; 0: nothing."""
    log_every: int = 1
    """Steps between looks at the loss (metrics keep every step all the same). On a GPU each look waits for it."""
    evaluations: int = 8
    """Quick held-out estimates during the run."""
    checkpoint_minutes: float = 1.0
    """Time between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    keep_best: bool = False
    """Keep the checkpoint with the best quick held-out estimate too; one is written after each that is the best yet."""

    def steps_in(self, seconds: float, step_seconds: float, tokens: int) -> int:
        """Steps for so much time, at so much for one, over a corpus of so many tokens; at least one."""
        steps = seconds / step_seconds
        if self.passes is not None:
            steps = min(steps, self.passes * tokens / (self.batch_size * self.sequence_length))
        return max(1, round(steps))

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "sequence_length",
            "accumulate",
            "sequence_parallel",
            "tensor_parallel",
            "replicas",
            "log_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed must fit in 64 bits, got {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        for name in ("minutes", "passes", "learning_rate", "muon_learning_rate", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        for name in ("weight_decay", "clip", "final_learning_rate", "evaluations", "spike"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        allowed = {
            "optimizer": ("adamw", "muon"),
            "schedule": ("cosine", "linear", "constant"),
            "precision": ("float32", "bfloat16"),
            "parallel": ("ddp", "fsdp"),
            "gather_precision": ("float32", "bfloat16"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.compile and (self.compile_blocks or self.recompute or self.parallel == "fsdp"):
            raise ConfigError(
                "compile is of the whole model; with recompute or parallel = fsdp take compile_blocks alone"
            )
        if self.gather_precision == "bfloat16" and (self.parallel, self.precision) != ("fsdp", "bfloat16"):
            raise ConfigError("gather_precision = bfloat16 needs parallel = fsdp and precision = bfloat16")
        if self.replicas > 1 and self.parallel != "fsdp":
            raise ConfigError(f"replicas is {self.replicas}, of shards: it needs parallel = fsdp")
        if self.sequence_length % self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel must divide sequence_length; got {self.sequence_parallel} and "
                f"{self.sequence_length}"
            )
        if self.sequence_parallel > 1 and self.carry_state:
            raise ConfigError("sequence_parallel shares one sequence, carry_state reads on from another; take one")
        if self.tensor_parallel > 1 and (self.carry_state or self.compile or self.compile_blocks):
            raise ConfigError(
                "tensor_parallel divides states and exchanges within layers: no carry_state, compile or compile_blocks"
            )
        if self.spike and not self.leave_out_bad_steps:
            raise ConfigError(f"spike is {self.spike}, which needs leave_out_bad_steps")

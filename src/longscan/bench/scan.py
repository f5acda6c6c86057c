"""`longscan bench scan`: the selective scan by itself, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longscan.bench import floors, others, unfused
from longscan.bench.contest import DTYPES, Call, Contender, Settings, beside, compare, describe, floor
from longscan.bench.peers import huggingface, mamba_ssm, mambapy
from longscan.bench.report import Report, Row
from longscan.ops import selective_scan

AXES = "batch,length,channels,state"

# Multiply-adds per (time, channel, state) that no way round is known: dt A; an exponential of degree 5; the state's
# decay and its input; the output.
_MULTIPLY_ADDS = 1 + 5 + 1 + 1 + 1


def run(settings: Settings) -> Report:
    """Scans with skip, gate, dt bias and softplus, as a Mamba block uses them.

    On the CPU the unit is nanoseconds per (time, channel) and core, on a GPU milliseconds, without launches. Beside it:
    the same scan unfused in plain PyTorch; and, over the same width, causal attention and a long convolution.
    """
    on_cpu = settings.device == "cpu"
    shapes = settings.shapes_of(AXES, (1, 2048, 1536, 16) if on_cpu else (8, 2048, 1536, 16))
    rows: list[Row] = []
    for shape in shapes:
        for dtype in settings.dtypes_of("float32", *(() if on_cpu else ("bfloat16",))):
            rows += _measure(shape, dtype, settings)
    unit = "ns per (time, channel) and core" if on_cpu else "ms"
    return Report(
        "scan",
        unit,
        higher_is_better=False,
        rows=rows,
        settings={"device": settings.device, "axes": AXES, "shapes": shapes},
    )


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> dict[str, Tensor]:
    """Inputs as a freshly initialised Mamba sees them: A = -(1 .. N), steps between 0.001 and 0.1."""
    batch, length, channels, state = shape
    # Drawn where they will be used: a CPU takes long over a million tokens.
    place = device if device == "cuda" else "cpu"
    generator = torch.Generator(place).manual_seed(seed)

    def normal(*axes: int) -> Tensor:
        return torch.randn(axes, generator=generator, device=place)

    steps = torch.exp(torch.rand(channels, generator=generator, device=place) * 4.6 - 6.9)
    inputs = {
        "x": normal(batch, length, channels).to(dtype),
        "dt": (normal(batch, length, channels) * 0.5).to(dtype),
        "A": -torch.arange(1, state + 1, dtype=torch.float32).repeat(channels, 1),
        "B": normal(batch, length, state).to(dtype),
        "C": normal(batch, length, state).to(dtype),
        "D": normal(channels),
        "z": normal(batch, length, channels).to(dtype),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _measure(shape: tuple[int, ...], dtype: str, settings: Settings) -> list[Row]:
    batch, length, channels, _ = shape
    inputs = make_inputs(shape, DTYPES[dtype], settings.device, settings.seed)
    threads = torch.get_num_threads()
    per_second = threads * 1e9 / (batch * length * channels) if settings.device == "cpu" else 1e3

    def to_value(seconds: float) -> float:
        return seconds * per_second

    rates = floors.Rates(settings.device)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    rows: list[Row] = []
    truths: dict[str, tuple[Tensor, ...]] = {}
    for phase in ("forward", *(() if settings.device == "cpu" else ("backward",)), "forward and backward"):
        if phase == "forward" or "forward" in truths:
            # Both backward phases end in the same gradients.
            truths = {phase: definition(wide, phase)}
        (truth,) = truths.values()
        group = describe(shape, dtype, phase=phase).replace("phase ", "")
        contenders = [
            Contender(name, kind, preparation(build, inputs, phase)) for name, kind, build in contestants(settings)
        ]
        contenders += other_contenders(shape, DTYPES[dtype], settings, phase, rates)
        found = compare(
            group,
            contenders,
            truth,
            settings,
            dtype=DTYPES[dtype],
            to_value=to_value,
            graphs=True,
            moved=bytes_moved(inputs, phase),
        )
        rows += beside(found, floor_rows(group, inputs, shape, phase, settings, rates, to_value))
    return rows


def definition(inputs: dict[str, Tensor], phase: str) -> tuple[Tensor, ...]:
    """What a pass should give, by the reference."""
    return preparation(_ours("reference"), inputs, phase)()()


_Build = Callable[[dict[str, Tensor]], tuple[Callable[[], Tensor], list[Tensor]]]


def contestants(settings: Settings) -> list[tuple[str, str, _Build]]:
    """(name, kind, how to build it) of ours and everyone who computes the same scan."""
    peers: dict[str, _Build] = {
        "reference": _ours("reference"),
        "unfused": unfused.scan,
        "transformers": huggingface.scan,
        "mambapy": mambapy.scan,
        "mamba-ssm": mamba_ssm.scan,
    }
    asked = settings.peers_of(*peers, slow_on_gpu=("reference", "transformers"))
    return [("longscan", "ours", _ours(None)), *((name, "peer", peers[name]) for name in asked)]


def other_contenders(
    shape: tuple[int, ...], dtype: torch.dtype, settings: Settings, phase: str, rates: floors.Rates
) -> list[Contender]:
    """Attention and convolution over as many channels."""
    asked, device, found = settings.peers_of("attention", "convolution"), settings.device, []
    if "attention" in asked:
        found.append(
            Contender(
                "attention",
                "other",
                lambda: others.attention(shape, dtype, device, phase),
                moved=others.attention_moved(shape, dtype, device, phase),
                floor=others.attention_work(shape, phase) / rates.multiply_adds(others.attention_dtype(device, dtype)),
                note=f"something else: causal, heads of {others.head_width(shape[2])}, no projections",
            )
        )
    if "convolution" in asked:
        moved = others.convolution_moved(shape, phase)
        found.append(
            Contender(
                "convolution",
                "other",
                lambda: others.convolution(shape, device, phase),
                moved=moved,
                floor=moved / rates.bandwidth,
                note="something else: one FFT of twice the length, no making of its kernel",
            )
        )
    return found


def _ours(backend: str | None) -> _Build:
    def build(inputs: dict[str, Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        def call() -> Tensor:
            y = selective_scan(*inputs.values(), dt_softplus=True, backend=backend)
            assert isinstance(y, Tensor)
            return y

        return call, list(inputs.values())

    return build


def _leaves(inputs: dict[str, Tensor], backward: bool) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_(backward) for name, tensor in inputs.items()}


def preparation(build: _Build, inputs: dict[str, Tensor], phase: str) -> Callable[[], Call]:
    """A contender's `prepare` for a phase: forward, backward, or both."""
    return lambda: _call(*build(_leaves(inputs, phase != "forward")), phase)


def _call(scan: Callable[[], Tensor], leaves: list[Tensor], phase: str) -> Call:
    """The pass that is timed. Forward gives y; backward the gradients of A, D and dt_bias, whose layout all share."""
    before = scan() if phase == "backward" else None

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (scan(),)

    def gradients() -> tuple[Tensor, ...]:
        y = scan() if before is None else before
        found = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=before is not None)
        return found[2], found[5], found[7]

    return forward if phase == "forward" else gradients


def bytes_moved(inputs: dict[str, Tensor], phase: str) -> int:
    """Forward reads the inputs and writes y; backward reads them and y's gradient, and writes theirs."""
    output = inputs["x"].numel() * inputs["x"].element_size()
    everything = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
    forward, backward = everything + output, 2 * everything + output
    return {"forward": forward, "backward": backward, "forward and backward": forward + backward}[phase]


def floor_rows(
    group: str,
    inputs: dict[str, Tensor],
    shape: tuple[int, ...],
    phase: str,
    settings: Settings,
    rates: floors.Rates,
    to_value: Callable[[float], float],
) -> list[Row]:
    """What nothing can beat: memory traffic, and arithmetic."""
    batch, length, channels, state = shape
    note = "inputs read and output written once, at the speed memory is read"
    if phase != "forward":
        note = "inputs and gradients read and written once a pass, at the speed memory is read"
    seconds = bytes_moved(inputs, phase) / rates.bandwidth
    rows = [floor(group, "memory", seconds, to_value, note)]
    if settings.device == "cpu" and phase == "forward":
        work = batch * length * channels * state * _MULTIPLY_ADDS
        seconds = work / rates.multiply_adds(torch.float32)
        note = f"{_MULTIPLY_ADDS} multiply-adds a state, at the rate of a matrix product"
        rows.append(floor(group, "arithmetic", seconds, to_value, note))
    if settings.device == "cuda" and (rate := floors.exponentials_per_second()) is not None:
        # One for each decay, two for the softplus, two for the gate; in each direction, unless they are kept.
        count = batch * length * channels * (state + 4) * (2 if phase == "forward and backward" else 1)
        note = "a decay of every state, softplus and gate, at the rate of the special-function unit"
        rows.append(floor(group, "exponentials", count / rate, to_value, note))
    return rows

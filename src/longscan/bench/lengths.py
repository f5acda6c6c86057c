"""`longscan bench lengths`: time against length, of the scan, attention and a long convolution (figure 8, left).

The lengths double while the tokens of a pass stay about the same, so that work that is linear in the length takes the
same time throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.nn.attention import SDPBackend

from longscan.bench import floors, others, scan
from longscan.bench.contest import DTYPES, Contender, Settings, beside, compare, describe
from longscan.bench.report import Report, Row

AXES = "batch,length,channels,state"

#: Seconds of a pass above which a contender is not run any more.
_LONGEST_PASS = 5.0

#: Tokens at most over which outputs and gradients are compared with the definition's, which walks them one by one.
_CHECKED = 512

_PHASES = ("forward", "forward and backward")


def default_shapes(device: str) -> tuple[tuple[int, ...], ...]:
    """On a GPU 512 to 1,048,576 at 65,536 tokens a pass or one sequence, else 512 to 8,192 at 8,192 tokens."""
    tokens, longest, channels = (2**13, 2**13, 64) if device == "cpu" else (2**16, 2**20, 1024)
    lengths = [2**power for power in range(9, longest.bit_length())]
    return tuple((max(1, tokens // length), length, channels, 16) for length in lengths)


def run(settings: Settings) -> Report:
    """Milliseconds a pass, on a GPU without launches.

    The scans are compared with the definition over 512 tokens of one sequence, and timed over all; so an error
    that only long sequences show would not be seen here (tests/ops look for those). Attention is left out where a pass
    would take more than 5 seconds, judging by a shorter one; what has no room says so.
    """
    shapes = settings.shapes_of(AXES, *default_shapes(settings.device))
    if settings.budget is None:
        settings = replace(settings, budget=0.4 if settings.device == "cpu" else 1.0)
    rows: list[Row] = []
    for dtype in settings.dtypes_of("float32" if settings.device == "cpu" else "bfloat16"):
        sweep = _Sweep(dtype, settings)
        for shape in shapes:
            rows += sweep.measure(shape)
    about = {"device": settings.device, "axes": AXES, "shapes": shapes, "checked": _CHECKED}
    return Report("lengths", "ms", higher_is_better=False, rows=rows, settings=about)


class _Sweep:
    """One dtype over all shapes, with what the shorter ones taught."""

    def __init__(self, dtype: str, settings: Settings) -> None:
        self._name, self._dtype, self._settings = dtype, DTYPES[dtype], settings
        self._rates = floors.Rates(settings.device)
        #: Of each phase: seconds of attention a multiply-add, and the backend that was fastest.
        self._attention: dict[str, tuple[float, SDPBackend | None]] = {}
        self._truths: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def measure(self, shape: tuple[int, ...]) -> list[Row]:
        settings = self._settings
        inputs = scan.make_inputs(shape, self._dtype, settings.device, settings.seed)
        length = min(shape[1], _CHECKED)
        few = scan.make_inputs((1, length, *shape[2:]), self._dtype, settings.device, settings.seed)
        rows: list[Row] = []
        for phase in _PHASES:
            contenders = [
                Contender(name, kind, scan.preparation(build, inputs, phase), check=scan.preparation(build, few, phase))
                for name, kind, build in scan.contestants(settings)
                # A thousand launches and more for one pass tell nothing of the length.
                if name not in ("reference", "transformers") or settings.peers is not None
            ]
            contenders += [
                self._careful(own, shape, phase)
                for own in scan.other_contenders(shape, self._dtype, settings, phase, self._rates)
            ]
            group = describe(shape, self._name, phase=phase).replace("phase ", "")
            found = compare(
                group,
                contenders,
                self._truth(few, phase),
                settings,
                dtype=self._dtype,
                to_value=_milliseconds,
                graphs=True,
                moved=scan.bytes_moved(inputs, phase),
            )
            self._learn(found, shape, phase)
            found = [replace(row, series=f"{phase} {self._name}", place=shape[1]) for row in found]
            bounds = scan.floor_rows(group, inputs, shape, phase, settings, self._rates, _milliseconds)
            rows += beside(found, bounds)
        return rows

    def _truth(self, few: dict[str, Tensor], phase: str) -> tuple[Tensor, ...]:
        key = (phase, *few["x"].shape, few["A"].shape[1])
        if key not in self._truths:
            wide = {name: tensor.double() for name, tensor in few.items()}
            self._truths[key] = scan.definition(wide, phase)
        return self._truths[key]

    def _careful(self, contender: Contender, shape: tuple[int, ...], phase: str) -> Contender:
        """Attention is not run where it would take too long, and tries its backends only where that is quick."""
        if contender.name != "attention" or phase not in self._attention:
            return contender
        rate, backend = self._attention[phase]
        predicted = rate * others.attention_work(shape, phase)
        if predicted > _LONGEST_PASS:
            return replace(contender, skip=f"skipped: about {predicted:.0f} s a pass")
        if predicted < 0.05:
            return contender
        return replace(contender, prepare=self._attend(shape, phase, backend))

    def _attend(self, shape: tuple[int, ...], phase: str, backend: SDPBackend | None) -> Callable[[], others.Pass]:
        return lambda: others.attention(shape, self._dtype, self._settings.device, phase, backend)

    def _learn(self, rows: list[Row], shape: tuple[int, ...], phase: str) -> None:
        for row in rows:
            if row.contender == "attention" and row.timing is not None:
                named = [one for one in others.BACKENDS if f"{others.backend_name(one)}," in row.note]
                rate = row.timing.median / others.attention_work(shape, phase)
                self._attention[phase] = rate, named[0] if named else None


def _milliseconds(seconds: float) -> float:
    return seconds * 1e3

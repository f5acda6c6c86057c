"""Dashed paths: are the two dots the ends of the same one? (Linsley et al. 2018, Kim et al. 2020; Tay et al. 2021)

Two long paths grow side by side from places ``seed_distance`` apart, dash after dash in turn; short ones fill what room
is left. From the end of a dash to the joint with the next is a margin, and from there to where that begins another. The
next dash turns by an angle of density ~ cos^2(continuity * angle), up to 90 degrees over continuity. No dash comes
nearer to another than two margins and a thickness, but to those before and after it.

The published script keeps dashes apart by masks of pixels, which lag a dash behind; here distances are exact, so that
labels are too. It starts anew where a path cannot go on; here both take a few dashes back first. By its arithmetic the
target paths of the 32 x 32 images are darker than the others (contrasts 2 * 0.75 and 2), which would tell them apart;
here all dashes are equally bright.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses

import numpy as np
from numba import prange

from longscan.errors import ArgumentError, DataError
from longscan.ops.jit import inline, kernel, parallel_kernel, run
from longscan.tasks.generators.randoms import below, stream, uniform

# Draws until a dash, a short path, a pair of long paths has a place.
_DASH_TRIES = 20
_SHORT_TRIES = 50
_LONG_TRIES = 1_000
# Long paths at a dead end take back up to so many dashes, so many times; then they start anew.
_DEAD_ENDS = 100
_TAKEN_BACK = 8


@dataclasses.dataclass(frozen=True)
class Paths:
    """What an image is like; lengths are in pixels.

    Args:
        size: of the square image.
        dashes, dash: of each of the two long paths: how many, and how long each.
        thickness: of a dash.
        margins: half gaps between dashes, one of which an image draws.
        distractors, distractor_dashes: short paths, as far as there is room, and their dashes.
        continuity: how straight paths are, at least 1.
        seed_distance: between the origins of the two long paths; they start twice as far from the edges.
        marker: radius of a dot.
        padding: free of everything, at the edges.
        contrast: brightness of a dash; that of a dot is 1.

    Raises:
        ArgumentError: a value is not allowed.
    """

    size: int
    dashes: int
    dash: float
    thickness: float
    margins: tuple[float, ...]
    distractors: int
    distractor_dashes: int
    continuity: float
    seed_distance: float
    marker: float
    padding: float = 1.0
    contrast: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 4 * self.seed_distance:
            raise ArgumentError(f"size must be at least 4 seed_distance, {4 * self.seed_distance:g}; got {self.size}")
        if self.dashes < 1 or self.distractor_dashes < 1 or self.distractors < 0:
            raise ArgumentError(f"paths need a dash at least, got {self}")
        if not self.margins or self.dash >= 2 * (2 * min(self.margins) + self.thickness):
            raise ArgumentError(
                f"dash must be shorter than 4 margins and 2 thicknesses, so that no two can cross; got {self.dash:g} "
                f"for margins {self.margins}"
            )
        if self.continuity < 1:
            raise ArgumentError(f"continuity must be at least 1, got {self.continuity}")


# Of the Arena's images, by size: dash, thickness, margins, continuity, seed_distance, marker, contrast; and dashes of
# all distractors.
_ARENA: dict[int, tuple[float, float, tuple[float, ...], float, float, float, float, int]] = {
    32: (2, 0.5, (1,), 1.0, 7, 1.5, 0.75, 20),
    64: (5, 1, (1,), 1.8, 12, 2.5, 0.8, 22),
    128: (5, 1.5, (2, 3), 1.8, 20, 3, 0.9, 35),
}


def arena_paths(size: int, dashes: int = 14) -> Paths:
    """Of the Long Range Arena's images: 32 x 32 (Pathfinder), 64 x 64 or 128 x 128 (Path-X).

    Args:
        size: of the image.
        dashes: of a long path: 14 (the Arena's, the hardest), 9 or 6 are its levels. Short paths have a third.

    Raises:
        ArgumentError: there is no such size.
    """
    if size not in _ARENA:
        raise ArgumentError(f"size must be one of {', '.join(map(str, _ARENA))}, got {size}")
    dash, thickness, margins, continuity, seed_distance, marker, contrast, room = _ARENA[size]
    short = max(1, dashes // 3)
    return Paths(
        size=size,
        dashes=dashes,
        dash=dash,
        thickness=thickness,
        margins=margins,
        distractors=room // short,
        distractor_dashes=short,
        continuity=continuity,
        seed_distance=seed_distance,
        marker=marker,
        contrast=contrast,
    )


# What compiled code knows of an image, for each margin: ``clearance`` is between dashes, which lie in ``low .. high``.
_COUNTS = ("dashes", "distractors", "distractor_dashes")
_SIZES = ("dash", "thickness", "continuity", "seed_distance", "marker", "contrast")
_OF_MARGIN = ("margin", "clearance", "low", "high")
_RULES = np.dtype([(name, np.int64) for name in _COUNTS] + [(name, np.float64) for name in (*_SIZES, *_OF_MARGIN)])


def _rules(paths: Paths) -> np.ndarray:
    rules = np.empty(len(paths.margins), _RULES)
    rules["margin"] = paths.margins
    for name in (*_COUNTS, *_SIZES):
        rules[name] = getattr(paths, name)
    rules["clearance"] = 2 * rules["margin"] + paths.thickness
    rules["low"] = paths.padding + rules["margin"] + paths.thickness / 2
    rules["high"] = paths.size - rules["low"]
    return rules


@inline
def _square_distance(px, py, ax, ay, bx, by):
    """Of a point to the line from a to b."""
    dx, dy = bx - ax, by - ay
    along = ((px - ax) * dx + (py - ay) * dy) / max(dx * dx + dy * dy, 1e-12)
    along = min(max(along, 0.0), 1.0)
    x, y = ax + along * dx - px, ay + along * dy - py
    return x * x + y * y


@inline
def _fits(lines, count, skipped, rules):
    """Whether dash ``count`` lies within the bounds and clear of all before it, one of which may be skipped."""
    ax, ay, bx, by = lines[count, 0], lines[count, 1], lines[count, 2], lines[count, 3]
    if min(ax, ay, bx, by) < rules.low or max(ax, ay, bx, by) > rules.high:
        return False
    square, reach = rules.clearance**2, rules.clearance + 2.0 * rules.dash
    for other in range(count):
        cx, cy, dx, dy = lines[other, 0], lines[other, 1], lines[other, 2], lines[other, 3]
        if other == skipped or max(abs(cx - ax), abs(cy - ay)) > reach:
            continue
        # Lines too short to cross are nearest at an end of one of them.
        if (
            _square_distance(ax, ay, cx, cy, dx, dy) < square
            or _square_distance(bx, by, cx, cy, dx, dy) < square
            or _square_distance(cx, cy, ax, ay, bx, by) < square
            or _square_distance(dx, dy, ax, ay, bx, by) < square
        ):
            return False
    return True


@inline
def _put(lines, headings, count, x, y, heading, rules):
    headings[count] = heading
    lines[count, 0], lines[count, 1] = x, y
    lines[count, 2], lines[count, 3] = x + rules.dash * np.cos(heading), y + rules.dash * np.sin(heading)


@inline
def _turn(random, continuity):
    """An angle of density ~ cos^2(continuity * angle)."""
    widest = 0.5 * np.pi / continuity
    while True:
        angle = (2.0 * uniform(random) - 1.0) * widest
        if uniform(random) < np.cos(continuity * angle) ** 2:
            return angle


@inline
def _begin(random, lines, headings, count, x, y, rules):
    """Begin a path at a place, with dash ``count``; whether there was room."""
    _put(lines, headings, count, x, y, 2.0 * np.pi * uniform(random), rules)
    return _fits(lines, count, -1, rules)


@inline
def _extend(random, lines, headings, count, last, rules):
    """Go on with dash ``count`` from the end of dash ``last``; whether there was room."""
    x = lines[last, 2] + rules.margin * np.cos(headings[last])
    y = lines[last, 3] + rules.margin * np.sin(headings[last])
    for _ in range(_DASH_TRIES):
        heading = headings[last] + _turn(random, rules.continuity)
        from_x, from_y = x + rules.margin * np.cos(heading), y + rules.margin * np.sin(heading)
        _put(lines, headings, count, from_x, from_y, heading, rules)
        if _fits(lines, count, last, rules):
            return True
    return False


@inline
def _long_paths(random, lines, headings, rules, size):
    """Two paths, dashes 0, 2, ... and 1, 3, ...; whether there was room."""
    room, distance = size - 4.0 * rules.seed_distance, rules.seed_distance
    x, y = 2.0 * distance + room * uniform(random), 2.0 * distance + room * uniform(random)
    if not _begin(random, lines, headings, 0, x, y, rules):
        return False
    aside = 2.0 * np.pi * uniform(random)
    if not _begin(random, lines, headings, 1, x + distance * np.cos(aside), y + distance * np.sin(aside), rules):
        return False
    count, dead_ends = 2, 0
    while count < 2 * rules.dashes:
        if _extend(random, lines, headings, count, count - 2, rules):
            count += 1
        elif dead_ends == _DEAD_ENDS:
            return False
        else:
            dead_ends += 1
            count = max(2, count - 1 - below(random, _TAKEN_BACK))
    return True


@inline
def _short_path(random, lines, headings, first, rules):
    """A path of dashes ``first``, ``first + 1``, ...; whether there was room."""
    room = rules.high - rules.low
    x, y = rules.low + room * uniform(random), rules.low + room * uniform(random)
    if not _begin(random, lines, headings, first, x, y, rules):
        return False
    for count in range(first + 1, first + rules.distractor_dashes):
        if not _extend(random, lines, headings, count, count - 1, rules):
            return False
    return True


@inline
def _grow(random, lines, headings, rules, size):
    """All paths of an image: how many dashes they have; 0: the long ones found no room."""
    for _ in range(_LONG_TRIES):
        if _long_paths(random, lines, headings, rules, size):
            count = 2 * rules.dashes
            for _ in range(rules.distractors):
                for _ in range(_SHORT_TRIES):
                    if _short_path(random, lines, headings, count, rules):
                        count += rules.distractor_dashes
                        break
            return count
    return 0


@inline
def _draw(image, ax, ay, bx, by, radius, brightness):
    """Draw what lies within a radius of a line; how far a pixel's middle is in or out smooths the edge. Lines thinner
    than a pixel are as bright as others."""
    size, outer = image.shape[0], radius + 0.5
    peak = min(outer, 1.0)
    for row in range(max(0, int(min(ay, by) - outer)), min(size, int(max(ay, by) + outer) + 1)):
        for column in range(max(0, int(min(ax, bx) - outer)), min(size, int(max(ax, bx) + outer) + 1)):
            away = np.sqrt(_square_distance(column + 0.5, row + 0.5, ax, ay, bx, by))
            shade = np.uint8(255.0 * brightness * min(max(outer - away, 0.0), peak) / peak + 0.5)
            image[row, column] = max(image[row, column], shade)


@kernel
def _image(task, seed, first, choices, images, labels, lines, counts, dots):
    random = stream(seed, first + task)
    image, own, dot = images[task], lines[task], dots[task]
    rules = choices[below(random, len(choices))]
    count = _grow(random, own, np.empty(len(own)), rules, image.shape[0])
    counts[task] = count
    if count == 0:
        return
    label, path = (first + task) % 2, below(random, 2)
    labels[task] = label
    end = 2 * (rules.dashes - 1) + (path if label == 1 else 1 - path)
    dot[0], dot[1], dot[2], dot[3] = own[path, 0], own[path, 1], own[end, 2], own[end, 3]
    image[:] = 0
    for line in own[:count]:
        _draw(image, line[0], line[1], line[2], line[3], 0.5 * rules.thickness, rules.contrast)
    for at in (0, 2):
        _draw(image, dot[at], dot[at + 1], dot[at], dot[at + 1], rules.marker, 1.0)


@parallel_kernel
def _images(tasks, seed, first, choices, images, labels, lines, counts, dots):
    for task in prange(tasks):
        _image(task, seed, first, choices, images, labels, lines, counts, dots)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Images and what they are of.

    Attributes:
        images: (count, size, size) uint8.
        labels: (count,) uint8; 1: the dots are the ends of one path. Every other image is.
        lines: (count, most, 4) float64: both ends of each dash, x and y of the first and of the second, in pixels from
            the left and the top edge.
        counts: (count,) int64, how many dashes an image has.
        dots: (count, 4) float64, the middles of both.
    """

    images: np.ndarray
    labels: np.ndarray
    lines: np.ndarray
    counts: np.ndarray
    dots: np.ndarray


def draw_paths(count: int, paths: Paths, *, seed: int, first: int = 0) -> Drawn:
    """Images number ``first`` to ``first + count - 1`` of a seed; equal seeds give equal images.

    Raises:
        DataError: two long paths do not find room.
    """
    most = 2 * paths.dashes + paths.distractors * paths.distractor_dashes
    drawn = Drawn(
        images=np.empty((count, paths.size, paths.size), np.uint8),
        labels=np.empty(count, np.uint8),
        lines=np.empty((count, most, 4)),
        counts=np.empty(count, np.int64),
        dots=np.empty((count, 4)),
    )
    arrays = (getattr(drawn, field.name) for field in dataclasses.fields(drawn))
    run(_images, _image, count, seed, first, _rules(paths), *arrays)
    if not drawn.counts.all():
        raise DataError(f"two paths of {paths.dashes} dashes found no room in {_LONG_TRIES:,} tries; got {paths}")
    return drawn

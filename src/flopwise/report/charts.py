"""Charts as inline SVG, drawn without a library: lines or points over two axes, and stacked bars.

Colours are numbers: the style sheet gives each a colour (light and dark) and a dash pattern, so a method looks the same
in every chart. Sizes are in units of the SVG's view box, which scales with the page.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from flopwise.report.words import number

WIDTH, HEIGHT = 520, 320
LETTER = 8.4  # width of a letter in a label, at its larger size on narrow screens
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 34, 56  # room for the ticks and the two axis labels


@dataclass(frozen=True)
class Axis:
    """`unit` follows the numbers where they are read out; `low` and `high` override the range of the data.

    A `reverse` axis has its small values at the top, or the right.
    """

    label: str
    unit: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None
    reverse: bool = False


@dataclass(frozen=True)
class Series:
    """A line through `points` (x, y) in ascending x; `band` holds (low, high) at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] | None = None
    colour: int = 0

    def heights(self) -> list[float]:
        """Every y which is drawn, the band's included."""
        return [y for _, y in self.points] + [y for pair in self.band or () for y in pair]


@dataclass(frozen=True)
class Cloud:
    """Points (x, y, label) which are not joined; an empty label is not written."""

    name: str
    points: Sequence[tuple[float, float, str]]
    colour: int = 0


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points to the left of which none is as high, from left to right: cheaper means worse."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """The multiples of a step (1, 2 or 5 times a power of ten) within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power, 2 * power, 5 * power, 10 * power), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; the powers alone where those would crowd."""
    powers = [10.0**exponent for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    return [factor * power for power in powers for factor in factors if low <= factor * power <= high]


def line_chart(title: str, series: Sequence[Series], *, x: Axis, y: Axis) -> str:
    """A figure with one line per series; pointing at it, or its arrow keys, reads out every series at one x.

    Raises:
        ValueError: there is no point to draw, or a value <= 0 on a logarithmic axis.
    """
    xs = [point[0] for line in series for point in line.points]
    ys = [value for line in series for value in line.heights()]
    if not xs:
        raise ValueError(f"the chart {title!r} needs at least one point, but got none. Leave the chart out.")
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    across = _Scale(x, xs, start=LEFT, end=right, margin=0.0)
    up = _Scale(y, ys, start=bottom, end=TOP, margin=0.06)

    parts = _axes(across, up, x, y)
    for line in series:
        if line.band:
            lows = [(across(p[0]), up(low)) for p, (low, _) in zip(line.points, line.band, strict=True)]
            highs = [(across(p[0]), up(high)) for p, (_, high) in zip(line.points, line.band, strict=True)]
            parts.append(f'<path class="band s{line.colour}" d="{_path(lows + highs[::-1])}Z"/>')
    for line in series:
        if line.points:
            drawn = [(across(px), up(py)) for px, py in line.points]
            parts.append(f'<path class="line s{line.colour}" d="{_path(drawn)}"/>')
            parts.append(
                f'<circle class="end s{line.colour}" cx="{drawn[-1][0]:.1f}" cy="{drawn[-1][1]:.1f}" r="3.5"/>'
            )
    parts.append(f'<path class="cursor" d="M0 {TOP}V{bottom}" visibility="hidden"/>')

    ends = [f"{line.name} ends at {_with_unit(line.points[-1][1], y)}" for line in series if line.points]
    description = f"{title}. {_label(y)} against {_label(x)}: {'; '.join(ends)}."
    readout = [
        {
            "name": line.name,
            "colour": line.colour,
            "points": [_read_point(line, i, x, y, across, up) for i in range(len(line.points))],
        }
        for line in series
    ]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="plot" tabindex="0" role="group" '
        f'aria-label="{escape(title)}: the arrow keys read out the values" data-series="{escape(json.dumps(readout))}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
        '<div class="tip" role="status" hidden></div></div>'
        f"{_legend('s', [(line.colour, line.name) for line in series])}</figure>"
    )


def scatter(
    title: str,
    clouds: Sequence[Cloud],
    *,
    x: Axis,
    y: Axis,
    line: Sequence[tuple[float, float]] = (),
    level: tuple[float, str] | None = None,
) -> str:
    """A figure with labelled points, a thin `line` such as their frontier, and a horizontal `level` (y, its name).

    Raises:
        ValueError: there is no point to draw, or a value <= 0 on a logarithmic axis.
    """
    points = [point for cloud in clouds for point in cloud.points]
    if not points:
        raise ValueError(f"the chart {title!r} needs at least one point, but got none. Leave the chart out.")
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    heights = [point[1] for point in points] + ([level[0]] if level else [])
    across = _Scale(x, [point[0] for point in points], start=LEFT, end=right, margin=0.08)
    up = _Scale(y, heights, start=bottom, end=TOP, margin=0.08)

    parts = _axes(across, up, x, y)
    drawn = [(across(px), up(py), label) for px, py, label in points]
    named: list[Box] = []
    if level:
        at = up(level[0])
        wide = LETTER * len(level[1])
        corners = [(left, top) for top in (at - 18, at + 2) for left in (LEFT + 4, right - wide)]
        boxes = [(left, top, left + wide, top + 16) for left, top in corners]
        hidden = [sum(_overlap(box, (x - 5, y - 5, x + 5, y + 5)) for x, y, _ in drawn) for box in boxes]
        named = [boxes[hidden.index(min(hidden))]]
        parts.append(f'<path class="level" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text class="mark" x="{named[0][0]:.1f}" y="{named[0][1] + 12:.1f}">{escape(level[1])}</text>')
    if line:
        parts.append(f'<path class="frontier" d="{_path([(across(px), up(py)) for px, py in line])}"/>')
    for cloud in clouds:
        for px, py, label in cloud.points:
            name = f"{cloud.name}, {label}" if label else cloud.name
            value = f"{_label(x)} {_exactly(px)}, {_label(y)} {_exactly(py)}"
            parts.append(
                f'<circle class="end s{cloud.colour}" cx="{across(px):.1f}" cy="{up(py):.1f}" r="4.5">'
                f"<title>{escape(f'{name}: {value}')}</title></circle>"
            )
    for left, baseline, label in _place_labels(drawn, named):
        parts.append(f'<text class="mark" x="{left:.1f}" y="{baseline:.1f}">{escape(label)}</text>')
    counted = "; ".join(f"{cloud.name}: {len(cloud.points)}" for cloud in clouds if cloud.points)
    description = f"{title}. {_label(y)} against {_label(x)}. Points: {counted}."
    keys = [
        f'<li><svg width="14" height="14" aria-hidden="true"><circle class="end s{cloud.colour}" cx="7" cy="7" r="5"/>'
        f"</svg>{escape(cloud.name)}</li>"
        for cloud in clouds
        if cloud.points
    ]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class="scatter" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(keys)}</ul></figure>'
    )


def stacked_bars(title: str, parts: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], *, unit: str) -> str:
    """A figure with one horizontal bar per row (name, values), cut into the named `parts`, its values written below.

    Raises:
        ValueError: no bar is longer than 0.
    """
    longest = max((sum(values) for _, values in rows), default=0.0)
    if longest <= 0:
        raise ValueError(f"the chart {title!r} needs a bar longer than 0, but got none. Leave the chart out.")
    bars = []
    for name, values in rows:
        total = sum(values)
        shares = " · ".join(
            f"{part} {number(value)}" + (f" ({100 * value / total:.1f}\u00a0%)" if value else "")
            for part, value in zip(parts, values, strict=True)
        )
        left, shapes = 0.0, []
        for colour, value in enumerate(values):
            width = 100 * value / longest
            shapes.append(f'<rect class="p{colour}" x="{left:.2f}" width="{width:.2f}" height="1"/>')
            left += width
        bars.append(
            f'<p>{escape(name)}</p><svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(f"{name}: {shares}, in {unit}")}">{"".join(shapes)}</svg>'
            f'<p class="note">{escape(shares)}</p>'
        )
    return (
        f'<figure class="bars"><figcaption>{escape(f"{title}, {unit}")}</figcaption>'
        f"{''.join(bars)}{_legend('p', list(enumerate(parts)))}</figure>"
    )


class _Scale:
    """Maps the values of an axis to positions between `start` and `end`."""

    def __init__(self, axis: Axis, values: Sequence[float], *, start: float, end: float, margin: float) -> None:
        if axis.log and min(values) <= 0:
            raise ValueError(
                f"a logarithmic axis needs values above 0, but {axis.label!r} got {min(values)}. Use a linear axis."
            )
        self.log = axis.log
        self.start, self.end = (end, start) if axis.reverse else (start, end)
        low, high = self._bend(min(values)), self._bend(max(values))
        if low == high:
            low, high = low - 0.5, high + 0.5
        pad = margin * (high - low)
        self.low = low - pad if axis.low is None else self._bend(axis.low)
        self.high = high + pad if axis.high is None else self._bend(axis.high)

    def __call__(self, value: float) -> float:
        return self.start + (self._bend(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(10**self.low, 10**self.high) if self.log else linear_ticks(self.low, self.high)

    def _bend(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    """Ticks, their numbers, the lines behind and below the data, and the names of both axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in up.ticks():
        at = f"{up(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at}" dy=".33em" text-anchor="end">{tick:.6g}</text>')
    for tick in across.ticks():
        at = f"{across(tick):.1f}"
        parts.append(f'<path class="tick" d="M{at} {bottom}v5"/>')
        parts.append(f'<text x="{at}" y="{bottom + 22}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(f'<text class="label" x="0" y="16">{escape(_label(y))}</text>')
    parts.append(f'<text class="label" x="{right}" y="{HEIGHT - 8}" text-anchor="end">{escape(_label(x))}</text>')
    return parts


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _place_labels(
    points: Sequence[tuple[float, float, str]], written: Sequence[Box] = ()
) -> list[tuple[float, float, str]]:
    """Where the labels start, and their baselines: right, left, above or below, where they hide nothing; or nowhere."""
    taken: list[Box] = [*written, *((x - 5, y - 5, x + 5, y + 5) for x, y, _ in points)]
    placed = []
    for x, y, label in points:
        width = LETTER * len(label)
        for left, baseline in ((x + 8, y + 4), (x - 8 - width, y + 4), (x - width / 2, y - 9), (x - width / 2, y + 18)):
            box = (left, baseline - 11, left + width, baseline + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[3] <= HEIGHT - BOTTOM
            if label and inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                placed.append((left, baseline, label))
                break
    return placed


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _exactly(value: float) -> str:
    """Four digits: fidelities differ in the third."""
    return f"{value:.4g}"


def _label(axis: Axis) -> str:
    return f"{axis.label}, {axis.unit}" if axis.unit else axis.label


def _with_unit(value: float, axis: Axis) -> str:
    return f"{number(value)} {axis.unit}".rstrip()


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _read_point(line: Series, i: int, x: Axis, y: Axis, across: _Scale, up: _Scale) -> list[float | str]:
    """What the script shows of a point: where it is drawn, then its x and y as text."""
    px, py = line.points[i]
    text = _with_unit(py, y)
    if line.band:
        text += f" ({number(line.band[i][0])} to {number(line.band[i][1])})"
    return [round(across(px), 1), round(up(py), 1), f"{x.label} {_with_unit(px, x)}", text]


def _legend(kind: str, entries: Sequence[tuple[int, str]]) -> str:
    """`kind` is "s" for lines, "p" for parts of a bar."""
    swatch = '<path class="line s{0}" d="M1 7H27"/>' if kind == "s" else '<rect class="p{0}" width="14" height="14"/>'
    width = 28 if kind == "s" else 14
    items = [
        f'<li><svg width="{width}" height="14" aria-hidden="true">{swatch.format(colour)}</svg>{escape(name)}</li>'
        for colour, name in entries
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'

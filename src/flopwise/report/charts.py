"""Charts as inline SVG, drawn without a library: lines over two axes, and stacked bars.

Colours are numbers: the style sheet gives each a colour (light and dark) and a dash pattern, so a method looks the same
in every chart. Sizes are in units of the SVG's view box, which scales with the page.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flopwise.report.words import number

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 34, 56  # room for the ticks and the two axis labels


@dataclass(frozen=True)
class Axis:
    """`unit` follows the numbers where they are read out; `low` and `high` override the range of the data."""

    label: str
    unit: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None


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
        self.log, self.start, self.end = axis.log, start, end
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

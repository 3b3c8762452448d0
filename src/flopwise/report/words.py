"""Numbers as the page and the README write them."""

import math
from collections.abc import Iterable


def number(value: float) -> str:
    """Three significant digits: 0.210, 12.3, 1250."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def mean_std(mean: float, std: float | None) -> str:
    """0.210 ± 0.012: two digits of the spread, and the mean to the same place; the mean alone without a spread."""
    if std is None:
        return number(mean)
    decimals = max(0, 1 - math.floor(math.log10(std))) if std else 3
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def times(ratio: float) -> str:
    """0.74 ×"""
    return f"{ratio:.2f} ×"


def percent(share: float) -> str:
    """86.7 %"""
    return f"{100 * share:.1f} %"


def relative(ratio: float) -> str:
    """5.2 % lower"""
    change = 100 * (ratio - 1)
    return "unchanged" if change == 0 else f"{abs(change):.1f} % {'lower' if change < 0 else 'higher'}"


def plural(count: int, noun: str) -> str:
    """1 seed, 3 seeds"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def distinct(values: Iterable[object]) -> str:
    """The different values, in their order, with commas between."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def flop_unit(flops: float) -> tuple[float, str]:
    """The divisor and the name of the unit which suits an amount of FLOPs."""
    units = [(1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")]
    return next((unit for unit in units if flops >= 0.1 * unit[0]), (1.0, "FLOP"))


def flops_text(flops: float) -> str:
    """1.25 TFLOP"""
    divisor, unit = flop_unit(flops)
    return f"{number(flops / divisor)} {unit}"

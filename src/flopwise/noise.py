"""Whether noise explains a difference between runs: the rules that pages and verdicts share."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, two-sided, of 2 to 10 seeds


def beyond(gaps: Sequence[float]) -> bool:
    """Whether the mean of differences, seed by seed, is beyond Student's t at 95 %. It takes two at least."""
    return abs(fmean(gaps)) > T95[min(len(gaps), 10) - 2] * stdev(gaps) / math.sqrt(len(gaps))


def apart(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means of independent runs, two or more of each, lie two standard errors of their difference apart."""
    gap = fmean(ours) - fmean(theirs)
    within = 2 * math.sqrt(variance(ours) / len(ours) + variance(theirs) / len(theirs))
    return gap != 0 and not abs(gap) < within  # no number is no noise

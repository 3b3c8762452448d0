"""How speeds are compared: in one process, in turns, by the processor's time, which what else runs does not disturb."""

import time
from collections.abc import Callable, Mapping
from statistics import median

Work = Callable[[], object]


def take_turns(works: Mapping[str, Work], rounds: int, *, burst: int = 1, lead: int = 0) -> dict[str, float]:
    """Median processor seconds of each, one after the other, round after round, after a round that warms up.

    The processor's time is that of all threads: with one, it is how long the work takes on a machine of its own.

    Args:
        burst: calls in a row in one measurement, of which the mean counts: for work of less than a millisecond.
        lead: calls before each measurement that are not timed, to bring back into caches what the others drove out.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            for _ in range(lead):
                work()
            taken = cpu_seconds(work, burst)
            if round_:
                times[name].append(taken)
    return {name: median(taken) for name, taken in times.items()}


def cpu_seconds(work: Work, calls: int = 1) -> float:
    """Processor seconds of a call; the mean of several."""
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls

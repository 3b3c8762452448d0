"""Turns: who runs when, and what is counted."""

import time

from flopwise.core.timing import cpu_seconds, take_turns


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_they_take_turns_and_the_first_round_only_warms_up():
    calls: list[str] = []
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and set(found) == {"a", "b"}


def test_lead_and_burst():
    calls: list[str] = []
    take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=1, burst=2, lead=1)
    assert calls == (["a"] * 3 + ["b"] * 3) * 2


def test_the_median_of_rounds_and_the_mean_of_a_burst():
    taken = iter([0.05, 0.001, 0.001, 0.03])
    found = take_turns({"once slow": lambda: spin(next(taken)), "steady": lambda: spin(0.004)}, rounds=3)
    assert 0.001 <= found["once slow"] < 0.003 < found["steady"] < 0.012
    taken = iter([0.002, 0.006])
    assert 0.004 <= cpu_seconds(lambda: spin(next(taken)), calls=2) < 0.008


def test_waiting_is_not_counted():
    assert take_turns({"sleep": lambda: time.sleep(0.02)}, rounds=1)["sleep"] < 0.01

"""DDP and FSDP2 over torchrun on the loopback: one gate, an unbiased global gradient, and a job that loses a rank."""

from pathlib import Path

import pytest
import torch
from launch import needs_gloo, results, torchrun

from flopwise.importance_sampling import relative_variance, variance_ratio
from flopwise.importance_sampling.gate import RATIOS, Gate

WRAPS = [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)]
KILLED = [("ddp", 4), ("fsdp2", 2)]


@needs_gloo
@pytest.mark.parametrize(("wrap", "ranks"), WRAPS)
def test_the_global_gradient_is_unbiased_and_all_gates_agree(wrap: str, ranks: int, tmp_path: Path):
    assert torchrun("job.py", ranks, "unbiased+train", wrap, tmp_path) == 0
    first, *others = results(tmp_path, "unbiased", ranks)
    assert first["chi_square"] < 11
    for other in others:
        assert torch.equal(first["gradient"], other["gradient"])
        assert not torch.equal(first["indices"], other["indices"])  # draws are local and independent
    first, *others = results(tmp_path, "train", ranks)
    drawn = [decision[0] for decision in first["decisions"]]
    assert any(drawn) and not all(drawn)  # it switched on in between
    for other in others:
        assert first["decisions"] == other["decisions"]
        assert torch.equal(first["parameters"], other["parameters"])
    if (wrap, ranks) in KILLED:
        check_that_a_job_that_loses_a_rank_ends_identical(wrap, ranks, tmp_path)


def check_that_a_job_that_loses_a_rank_ends_identical(wrap: str, ranks: int, whole: Path) -> None:
    broken = whole / "broken"
    broken.mkdir()
    assert torchrun("job.py", ranks, "train", wrap, broken, 95) != 0
    assert len(list(broken.glob("checkpoint*"))) == 13 and not list(broken.glob("train_*.pt"))
    assert torchrun("job.py", ranks, "train", wrap, broken) == 0
    for one, other in zip(results(whole, "train", ranks), results(broken, "train", ranks), strict=True):
        assert torch.equal(one["parameters"], other["parameters"])
        assert one["decisions"][91:] == other["decisions"]
        assert one["metrics"] == other["metrics"] and one["flops"] == other["flops"]


@needs_gloo
def test_presamples_of_unequal_size_are_refused_on_every_rank(tmp_path: Path):
    assert torchrun("job.py", 2, "unequal", "ddp", tmp_path) == 0
    for rank, result in enumerate(results(tmp_path, "unequal", 2)):
        assert f"rank {rank} got {32 - rank} examples and the 2 ranks 63 in all" in result["error"]


def test_evidence_of_two_ranks_adds_up_to_the_variance_of_their_mean(generator: torch.Generator):
    """Local draws are independent, so the variance of the mean of two ranks is that of each, weighted by mean(S^2)."""
    one, other = torch.rand(60, generator=generator) ** 6, 0.1 + torch.rand(60, generator=generator)
    gate = Gate("auto", "without_replacement", 0.1)
    evidence = [a + b for a, b in zip(gate.evidence(one), gate.evidence(other), strict=True)]
    tau2 = gate.learn(evidence)
    assert tau2 == pytest.approx(variance_ratio(torch.cat([one, other])))
    squares = [float(s.double().square().sum()) for s in (one, other)]
    for ratio in RATIOS:
        expected = sum(
            square * relative_variance(scores, ratio) for square, scores in zip(squares, (one, other), strict=True)
        ) / sum(squares)
        assert gate.variances[ratio] == pytest.approx(0.9 + 0.1 * expected)

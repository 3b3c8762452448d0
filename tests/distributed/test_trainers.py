"""Lightning, Accelerate and the Hugging Face Trainer on two processes: one gate, data of their own, the right step."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from job import loss, network
from launch import needs_gloo, results, torchrun
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters
from trainers_job import EXAMPLES, SAVED, STEPS, WINDOW, language_model, weight

NEEDS = {"lightning": "lightning", "accelerate": "accelerate", "trainer": "transformers"}  # in the job's order
pytestmark = needs_gloo


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one launch: most of its time goes into the imports."""
    folder = tmp_path_factory.mktemp("job")
    installed = [what for what, library in NEEDS.items() if find_spec(library)]
    assert torchrun("trainers_job.py", 2, "+".join(installed), folder) == 0
    return folder


@pytest.mark.parametrize("what", list(NEEDS))
def test_two_processes_train_as_one(what: str, job: Path):
    pytest.importorskip(NEEDS[what])
    ranks = results(job, what, 2)
    first, other = ranks
    assert torch.equal(first["parameters"], other["parameters"])
    assert first["decisions"] == other["decisions"] and len(first["decisions"]) >= STEPS * WINDOW
    drawn = [decision[0] for decision in first["decisions"]]
    assert drawn[-1] and not drawn[0]  # it switched on in between
    assert first["seed"] != other["seed"]  # the gate adds up variances: draws are independent

    half, passes = EXAMPLES // 2, []
    for start in (0, half):
        loaded = first["loaded"][start : start + half], other["loaded"][start : start + half]
        assert sorted(loaded[0] + loaded[1]) == list(range(EXAMPLES))
        passes.append(loaded[0])
    assert passes[0] != passes[1]  # shuffled anew

    model: Any = language_model() if what == "trainer" else network()
    loss_of_step = loss_over_items if what == "trainer" else mean_loss
    for step in range(STEPS):
        windows, parameters, gradients = zip(*(rank["steps"][step] for rank in ranks), strict=True)
        assert torch.equal(gradients[0], gradients[1])
        vector_to_parameters(parameters[0], model.parameters())
        value = loss_of_step(model, windows[0] + windows[1])
        oracle = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        torch.testing.assert_close(gradients[0], oracle, rtol=1e-4, atol=1e-5 * float(oracle.abs().max()))


@pytest.mark.parametrize("what", list(NEEDS))
def test_two_processes_resumed_end_identical(what: str, job: Path):
    pytest.importorskip(NEEDS[what])
    for rank in results(job, what, 2):
        resumed = rank["resumed"]
        assert len(resumed["steps"]) == len(rank["steps"]) - SAVED
        assert resumed["decisions"] == rank["decisions"][SAVED * WINDOW :] and resumed["metrics"] == rank["metrics"]
        assert torch.equal(resumed["parameters"], rank["parameters"])


def mean_loss(model: Any, batches: list[Any]) -> torch.Tensor:
    """Mean over the ranks, and over the window of each, of the batches' weighted mean losses."""
    return torch.stack([(weights * loss(model(data[0]), data)).mean() for data, weights, _ in batches]).mean()


def loss_over_items(model: Any, batches: list[Any]) -> torch.Tensor:
    """The weighted losses of all tokens of all ranks, over the tokens that they stand for; a drawn batch stands for its
    presample."""
    total, items = torch.tensor(0.0), 0.0
    for data, weights, positions in batches:
        logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1]
        labels = data["labels"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        total = total + ((weights[:, None] * weight(data)) * losses).sum()
        items += float((labels != -100).sum()) if positions is None else positions * len(weights)
    return total / items


def test_lightning_refuses_data_that_are_not_shared_out(job: Path):
    pytest.importorskip("lightning")
    for rank in results(job, "lightning", 2):
        assert "each of 2 processes trains on data of its own; got sampler=SequentialSampler" in rank["refused"]

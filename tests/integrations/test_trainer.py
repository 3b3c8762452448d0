"""Importance sampling in the Hugging Face Trainer, on the real library."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from runs import killed_and_resumed_is_identical
from small_trainers import Skewed, Texts, arguments, bert, llama, trainer_of
from transformers import Trainer

from flopwise.integrations.trainer import ImportanceSamplingMixin

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


def parameters(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("kind", ["classes", "causal"])
def test_off_it_is_the_plain_trainer(kind: str, windows: int, tmp_path: Path):
    """Accumulation and num_items_in_batch with texts of different lengths, and the loss that is logged."""
    ends, losses = [], []
    for mixin in (False, True):
        model, data = (bert(), Texts()) if kind == "classes" else (llama(), Texts(causal=True))
        options = {"max_steps": 10, "gradient_accumulation_steps": windows, "optim": "sgd", "learning_rate": 0.1}
        trainer_kind = ImportanceSamplingMixin if mixin else Trainer
        trainer = trainer_of(model, data, tmp_path, kind=trainer_kind, importance={"gate": "never"}, **options)
        if kind == "classes" and not mixin:
            # transformers 5.23 adds up the losses of a window for Bert, which ignores num_items_in_batch
            trainer.loss_is_scaled_for_ga = False
        trainer.train()
        ends.append(parameters(trainer))
        losses.append(trainer.state.log_history[0]["loss"])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_window_of_drawn_batches_is_unbiased_for_the_mean_over_its_tokens(tmp_path: Path):
    """Two batches drawn from two presamples of unequal lengths: the gradient of the sum over num_items_in_batch."""
    trainer = trainer_of(
        llama(), Texts(causal=True), tmp_path, importance={"gate": "always"}, gradient_accumulation_steps=2
    )
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.model
    stream = trainer.get_train_dataloader()
    presamples = [presample for presample, _ in zip(iter(stream.passes), range(2), strict=False)]
    model, loss = trainer.model, trainer.loss_per_example
    weights = [p for n, p in model.named_parameters() if "lm_head" in n or "norm" in n]

    total, items = torch.tensor(0.0), torch.tensor(0.0)
    for presample in presamples:
        losses, mask = loss(trainer._score_forward(presample), presample)
        total, items = total + losses.sum() / len(losses), items + mask.sum() / len(losses)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(total / items, weights)])
    estimates = []
    for _ in range(150):
        batches = [trainer.sampler.select(presample) for presample in presamples]
        batches, count = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
        model.zero_grad()
        for batch in batches:
            trainer.training_step(model, batch, count)
        estimates.append(torch.cat([p.grad.flatten() for p in weights]))
    estimates = torch.stack(estimates)
    chi_square = len(estimates) * (estimates.mean(0) - truth).square().sum() / estimates.var(0).sum()
    assert chi_square < 11


def test_epochs_and_steps_are_the_trainers(tmp_path: Path):
    trainer = trainer_of(
        bert(), Texts(100), tmp_path, kind=Skewed, importance={"gate": "always"}, num_train_epochs=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2 * 7  # 100 examples in windows of 2 x 8
    assert trainer.state.epoch == 2.0
    assert trainer.sampler.metrics()["share_on"] == 0.75  # the last presample of a pass is 4 examples
    assert {"importance_R", "importance_tau2"} <= set(trainer.state.log_history[0])


def test_drawn_steps_take_the_scaled_rate(tmp_path: Path):
    trainer = trainer_of(bert(), Texts(), tmp_path, kind=Skewed, importance={"gate": "always"}, max_steps=30)
    rates = []
    real = trainer.create_optimizer

    def create(*arguments):
        optimizer = real(*arguments)
        optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    trainer.create_optimizer = create
    trainer.train()
    assert max(rates) > 3e-3 * 1.2
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3)


def test_evaluation_is_untouched(tmp_path: Path):
    trainer = trainer_of(bert(), Texts(), tmp_path, max_steps=3)
    trainer.train()
    ours = trainer.evaluate(Texts(40))["eval_loss"]
    assert ours == pytest.approx(Trainer(trainer.model, arguments(tmp_path)).evaluate(Texts(40))["eval_loss"], rel=1e-5)


def test_the_losses_it_knows_are_the_models_own(tmp_path: Path):
    trainer = trainer_of(bert(), Texts(), tmp_path)
    batch = {name: torch.stack([Texts()[i][name] for i in range(9)]) for name in ("input_ids", "labels")}
    assert trainer.loss_per_example(trainer.model(batch["input_ids"]).logits, batch).mean().item() == pytest.approx(
        trainer.model(**batch).loss.item(), rel=1e-5
    )
    trainer = trainer_of(llama(), Texts(causal=True), tmp_path)
    data = Texts(causal=True)
    batch = {name: torch.stack([data[i][name] for i in range(9)]) for name in data[0]}
    losses, mask = trainer.loss_per_example(trainer._score_forward(batch), batch)
    assert losses[mask].mean().item() == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-5)


def test_what_it_refuses(tmp_path: Path):
    with pytest.raises(ValueError, match="override loss_per_example"):
        ImportanceSamplingMixin(bert(), arguments(tmp_path), compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="presample_ratio is presample over batch"):
        ImportanceSamplingMixin(bert(), arguments(tmp_path), presample_ratio=0)
    trainer = trainer_of(bert(), Texts(), tmp_path)
    with pytest.raises(ValueError, match=r"outputs \(2, 3\) and labels \(2, 3, 4\)"):
        trainer.loss_per_example(torch.zeros(2, 3), {"labels": torch.zeros(2, 3, 4, dtype=torch.long)})
    trainer_of(bert(), Texts(), tmp_path, kind=Trainer, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match=r"importance_0_of_1\.pt is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_killed_and_resumed_is_identical(precision: str, tmp_path: Path):
    killed_and_resumed_is_identical("killed_trainer.py", tmp_path, precision, kill_at=[24, 80])

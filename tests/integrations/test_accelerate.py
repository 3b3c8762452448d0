"""Importance sampling in a loop prepared by Accelerate, on the real library."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate import Accelerator, DataLoaderConfiguration  # noqa: E402
from accelerate.data_loader import prepare_data_loader  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import GradientAccumulationPlugin  # noqa: E402
from runs import killed_and_resumed_is_identical  # noqa: E402
from sampling_problem import data, network, skewed_loss  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from flopwise import ImportanceSampler  # noqa: E402
from flopwise.integrations.accelerate import ImportanceSampling, beginner_of  # noqa: E402
from flopwise.integrations.importance import load_state, save_state  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(gate: Any = "always", *, windows: int = 1, seedable: bool = True, **options):
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=windows, sync_with_dataloader=False),
        **options,
    )
    model = network(0.0)
    loader = DataLoader(data(), batch_size=48, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01), loader)
    sampler = ImportanceSampler(lambda batch: model(batch[0]), skewed_loss, batch_size=8, gate=gate, model=model)
    return accelerator, model, optimizer, loader, sampler


def train(accelerator, model, optimizer, importance, passes: int) -> list:
    seen = []
    for _ in range(passes):
        for batch in importance.batches():
            with accelerator.accumulate(model):
                accelerator.backward(importance.sampler.loss(model(batch.data[0]), batch))
                optimizer.step()
                optimizer.zero_grad()
            seen.append((batch, accelerator.sync_gradients))
    return seen


def test_off_it_is_the_plain_loop_to_the_last_bit():
    accelerator, model, optimizer, loader, sampler = prepared("never")
    train(accelerator, model, optimizer, ImportanceSampling(accelerator, sampler, loader, optimizer), 2)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator, plain, optimizer, loader, _ = prepared("never")
    for epoch in range(2):
        loader.set_epoch(epoch)
        for x, y in loader:
            for a in range(0, len(x), 8):
                piece = x[a : a + 8], y[a : a + 8]
                accelerator.backward(skewed_loss(plain(piece[0]), piece).mean())
                optimizer.step()
                optimizer.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_windows_of_accumulation_run_across_presamples_and_passes():
    accelerator, model, optimizer, loader, sampler = prepared(windows=3)
    importance = ImportanceSampling(accelerator, sampler, loader, optimizer)
    assert sampler.accumulate == 3
    steps = [synchronised for _, synchronised in train(accelerator, model, optimizer, importance, 3)]
    assert steps == [False, False, True] * 4  # 4 presamples a pass


def test_drawn_batches_train_at_the_scaled_rate_and_rates_are_put_back():
    accelerator, model, optimizer, loader, sampler = prepared()
    importance = ImportanceSampling(accelerator, sampler, loader, optimizer)
    rates = []
    optimizer.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    train(accelerator, model, optimizer, importance, 8)
    assert sampler.rate_scale > 1 and max(rates) > 0.01
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_mixed_precision_scores_as_it_trains():
    accelerator, model, optimizer, loader, sampler = prepared("always", mixed_precision="bf16")
    dtypes = set()
    inner = accelerator.unwrap_model(model)[-1]
    inner.register_forward_hook(lambda module, inputs, output: dtypes.add((module.training, output.dtype)))
    train(accelerator, model, optimizer, ImportanceSampling(accelerator, sampler, loader, optimizer), 1)
    assert dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_windows_that_end_with_the_loader_are_refused():
    accelerator, _, optimizer, loader, sampler = prepared(windows=2)
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = True
    with pytest.raises(ValueError, match=r"got 2 steps that do.*sync_with_dataloader=False"):
        ImportanceSampling(accelerator, sampler, loader, optimizer)


def test_an_order_that_cannot_be_had_again_is_refused():
    accelerator, _, optimizer, loader, sampler = prepared(seedable=False)
    with pytest.raises(ValueError, match=r"got sampler=RandomSampler.*use_seedable_sampler=True"):
        ImportanceSampling(accelerator, sampler, loader, optimizer)


@pytest.mark.parametrize("shuffle", [False, True])
def test_two_processes_share_out_a_pass_and_go_back_to_a_place_in_it(shuffle: bool):
    passes = []
    for number in (0, 1):
        seen = []
        for rank in (0, 1):
            begin = beginner_of(shared_out(rank, shuffle=shuffle))
            whole, rest = list(begin(number, 0)), list(begin(number, 1))
            assert len(whole) == 2 and len(rest) == 1 and torch.equal(whole[1][0], rest[0][0])
            seen += whole
        passes.append(torch.cat([x for x, _ in seen]))
        assert torch.equal(passes[-1].sort(0).values, data().tensors[0].sort(0).values)
    assert torch.equal(*passes) is not shuffle


def test_processes_that_would_wait_for_each_other_are_refused():
    with pytest.raises(ValueError, match=r"got a loader with even_batches=False.*or drop_last=True"):
        beginner_of(shared_out(0, even_batches=False))


def shared_out(rank: int, *, shuffle: bool = True, even_batches: bool = True) -> Any:
    """What `Accelerator.prepare` makes of a loader on one of two processes."""
    return prepare_data_loader(
        DataLoader(data(), batch_size=48, shuffle=shuffle), num_processes=2, process_index=rank,
        even_batches=even_batches, use_seedable_sampler=True,
    )  # fmt: skip


def test_a_checkpoint_without_the_sampler_is_refused(tmp_path: Path):
    accelerator, _, optimizer, loader, sampler = prepared()
    accelerator.save_state(str(tmp_path))
    ImportanceSampling(accelerator, sampler, loader, optimizer)
    with pytest.raises(ValueError, match=r"importance_0_of_1\.pt is missing"):
        accelerator.load_state(str(tmp_path))


def test_a_checkpoint_of_two_processes_is_refused_by_one(tmp_path: Path):
    *_, sampler = prepared()
    save_state(sampler, tmp_path, 0, 2)
    load_state(sampler, tmp_path, 0, 2)
    with pytest.raises(ValueError, match=r"importance_0_of_1\.pt is missing.*another number of processes"):
        load_state(sampler, tmp_path, 0, 1)


@pytest.mark.parametrize(("loader", "precision"), [("seedable", "no"), ("stateful", "bf16")])
def test_killed_and_resumed_is_identical(loader: str, precision: str, tmp_path: Path):
    if loader == "stateful":
        pytest.importorskip("torchdata")
    killed_and_resumed_is_identical("killed_accelerate.py", tmp_path, loader, precision, kill_at=[20, 45])

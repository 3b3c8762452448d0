"""What a training run has spent: FLOPs, seconds and examples, counted once per input signature and then replayed."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from flopwise.core.batch import Examples

T = TypeVar("T")

LOADING = ("loading",)
_active: ContextVar["Ledger | None"] = ContextVar("flopwise_active_ledger", default=None)


class Ledger:
    """Counts what is spent inside `with ledger`: matrix products, convolutions and attention, forward and backward.

        with Ledger() as ledger:
            for x, y in ledger.batches(loader):
                cross_entropy(model(x), y).backward()
                optimizer.step(); optimizer.zero_grad()

    A FLOP is one multiply or one add, as `torch.utils.flop_counter` counts; elementwise work is not counted. Counting
    an operation costs microseconds of Python, too much for every step of a small model. So the body of a loop over
    `batches` is counted once for every input signature (structure, shapes, dtypes, devices) and replayed afterwards:
    a lookup. Everything else inside `with ledger` is counted as it runs. `ImportanceSampler.batches` does the same.

    A ledger may be entered again and goes on where it was. `state_dict` and `load_state_dict` carry it through a
    restart.

    Attributes:
        flops_by_phase: FLOPs spent in each phase ("training", "scoring", ...; "other" is everything not in a phase).
        seconds_by_phase: wall-clock seconds likewise.
        examples: examples trained on; one that is trained on twice counts twice.
    """

    def __init__(self) -> None:
        self.flops_by_phase: dict[str, int] = {}
        self.seconds_by_phase: dict[str, float] = {}
        self.examples = 0
        self._costs: dict[tuple, float] = {}
        self._restored_costs: dict[str, float] = {}
        self._frames: list[_Frame] = []
        self._meter = _Meter()
        self._since = 0.0

    @property
    def flops(self) -> int:
        """All FLOPs spent, over all phases."""
        self._settle()
        return sum(self.flops_by_phase.values())

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent inside `with ledger`, pauses left out."""
        self._settle()
        return sum(self.seconds_by_phase.values())

    def __enter__(self) -> "Ledger":
        if self._frames:
            raise RuntimeError("this Ledger is already counting: leave `with ledger` before it is entered again.")
        if _active.get() is not None:
            raise RuntimeError("another Ledger is counting: one at a time, or its FLOPs would be counted twice.")
        _active.set(self)
        self._open(_Frame("other", counting=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._frames:  # a loop left by `break` may have left its last step open
            self._close(self._frames[-1])
        _active.set(None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is counted, neither FLOPs nor seconds: for evaluation and checkpoints."""
        frame = self._open(_Frame(None, counting=False))
        try:
            yield
        finally:
            self._close(frame)

    def phase(self, name: str, examples: Examples) -> "Cost":
        """`with ledger.phase("training", examples) as cost:` books what runs inside under that name.

        Counted the first time `examples` have this signature, then replayed. Replayed FLOPs are booked on entry, so
        that `spent` is right while the last step is still open.
        """
        return Cost(self, name, examples)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of `loader`; what the loop does with each is booked as training, see `phase` and `load`."""
        for data in self.load(loader):
            with self.phase("training", Examples(data)):
                yield data

    def load(self, loader: Iterable[T]) -> Iterator[T]:
        """The items of `loader`; what making them costs (augmentation) is booked as loading.

        Counted for the first item, then replayed in proportion to the number of examples. The consumer's own
        bookkeeping between two items costs no FLOPs worth counting, and is not.
        """
        if self._paused:
            yield from loader
            return
        outside = self._open(_Frame("other", counting=False)) if self._frames else None
        try:
            iterator = iter(loader)
            while True:
                per_example = self._known_cost(LOADING)
                frame = self._open(_Frame("loading", counting=per_example is None))
                try:
                    data = next(iterator)
                except StopIteration:
                    return
                finally:
                    self._close(frame)
                if per_example is None:
                    self._costs[LOADING] = frame.flops / len(Examples(data))
                elif per_example > 0:
                    self._book("loading", round(per_example * len(Examples(data))))
                yield data
        finally:
            if outside is not None:
                self._close(outside)

    def recount(self) -> None:
        """Forget the counted costs: call it when the same input begins to cost something else (layers frozen)."""
        self._costs.clear()
        self._restored_costs.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was spent and what each signature costs, as plain numbers and strings. The open step is in it.

        With the costs restored, a resumed run books every step at the same moment as the run that was not interrupted,
        so whatever follows `budget.share(ledger)` is equal to the last bit. Take it at the end of a step: what an open
        step has cost so far counts as the cost of its signature.
        """
        self._settle()
        open_steps = {repr(frame.key): frame.flops for frame in self._frames if frame.counting and frame.key}
        return {
            "flops_by_phase": dict(self.flops_by_phase),
            "seconds_by_phase": dict(self.seconds_by_phase),
            "examples": self.examples,
            "costs": self._restored_costs | {repr(key): flops for key, flops in self._costs.items()} | open_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. When the code has changed what a step costs since then, call `recount`."""
        self.flops_by_phase = dict(state["flops_by_phase"])
        self.seconds_by_phase = dict(state["seconds_by_phase"])
        self.examples = state["examples"]
        self._restored_costs = dict(state["costs"])

    @property
    def _paused(self) -> bool:
        return bool(self._frames) and self._frames[-1].name is None

    def _known_cost(self, key: tuple) -> float | None:
        flops = self._costs.get(key)
        if flops is None and self._restored_costs:
            flops = self._restored_costs.get(repr(key))
            if flops is not None:
                self._costs[key] = flops
        return flops

    def _open(self, frame: "_Frame") -> "_Frame":
        self._settle()
        self._frames.append(frame)
        self._meter.taken_over = False
        self._meter.run(frame.counting)
        return frame

    def _close(self, frame: "_Frame") -> None:
        if frame not in self._frames:  # it was closed with the whole ledger
            return
        self._settle()
        self._frames.remove(frame)
        self._meter.run(bool(self._frames) and self._frames[-1].counting)

    def _settle(self) -> None:
        """Give the innermost frame what was spent since the last call."""
        now = time.perf_counter()
        if self._frames:
            frame = self._frames[-1]
            seconds = now - self._since
            frame.seconds += seconds
            if frame.name is not None:
                self.seconds_by_phase[frame.name] = self.seconds_by_phase.get(frame.name, 0.0) + seconds
                if frame.counting:
                    flops = self._meter.take()
                    frame.flops += flops
                    self._book(frame.name, flops)
        self._since = now

    def _book(self, name: str, flops: int) -> None:
        self.flops_by_phase[name] = self.flops_by_phase.get(name, 0) + flops


def active_ledger() -> Ledger | None:
    """The ledger whose `with` block this is, if any."""
    return _active.get()


class Cost:
    """What one phase costs: at once when it is replayed, so far when it is being counted; and its `with` block.

    A class and not a generator: between two steps of a network this code is in no cache of the processor.
    """

    def __init__(self, ledger: Ledger, name: str, examples: Examples) -> None:
        key = (name, examples.signature)
        known = ledger._known_cost(key)
        self._ledger, self._name = ledger, name
        self._frame = _Frame(name, known is None, key, int(known or 0))
        self._ignored = ledger._paused  # a probe that must not cost anything
        self.examples = len(examples)

    def __enter__(self) -> "Cost":
        if not self._ignored:
            ledger, frame = self._ledger, self._frame
            ledger._open(frame)
            if self._name == "training":
                ledger.examples += self.examples
            ledger._book(self._name, frame.flops)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._ignored:
            return
        ledger, frame = self._ledger, self._frame
        ledger._close(frame)
        if not frame.counting or kind is not None:  # a step left half-way is no measure of a whole one
            return
        if ledger._meter.taken_over:
            raise RuntimeError(
                "another loop over a sampler or ledger began inside this step; nobody could say whose FLOPs are "
                "whose: finish one step before the next begins."
            )
        ledger._costs[frame.key] = frame.flops

    @property
    def flops(self) -> int:
        if self._frame.counting:
            self._ledger._settle()
        return self._frame.flops

    @property
    def seconds(self) -> float:
        self._ledger._settle()
        return self._frame.seconds

    @property
    def counted(self) -> bool:
        """Whether FLOPs were counted this time, which slows it: its seconds are no measure."""
        return self._frame.counting


class _Frame:
    """One nested stretch of a ledger's time; `name` None is a pause."""

    def __init__(self, name: str | None, counting: bool, key: tuple = (), flops: int = 0) -> None:
        self.name, self.counting = name, counting
        self.key = key  # of the cost to remember
        self.flops, self.seconds = flops, 0.0


class _Meter:
    """torch's FlopCounterMode, switched on and off, refusing the operations it would count as zero.

    One meter runs at a time. A loop that was left in a counted step (an exception in a notebook, whose traceback keeps
    the loop alive) still has its meter on; the next one to start takes over.
    """

    running: ClassVar["_Meter | None"] = None

    def __init__(self) -> None:
        self._counter: FlopCounterMode | None = None
        self._guard = _RefuseUncounted()
        self._taken = 0
        self.taken_over = False

    def run(self, on: bool) -> None:
        if on and self._counter is None:
            if _Meter.running is not None:
                _Meter.running.taken_over = True
                _Meter.running._stop()
            self._guard.__enter__()
            self._counter = FlopCounterMode(display=False, custom_mapping=EXTRA_FORMULAS)
            self._counter.mod_tracker = _NoModules()  # type: ignore[assignment]
            self._counter.__enter__()
            self._taken, _Meter.running = 0, self
        elif not on and self._counter is not None:
            self._stop()

    def _stop(self) -> None:
        if self._counter is None or _get_current_dispatch_mode() is not self._counter.mode:
            raise RuntimeError(
                "a TorchDispatchMode was entered while the ledger counted, and is still open: "
                "enter it before the ledger, or leave it within the step."
            )
        self._counter.__exit__(None, None, None)
        self._guard.__exit__(None, None, None)
        self._counter = _Meter.running = None

    def take(self) -> int:
        """The FLOPs counted since the last call."""
        if self._counter is None:
            return 0
        total = self._counter.get_total_flops()
        fresh, self._taken = total - self._taken, total
        return fresh


class _NoModules:
    """In place of torch's module tracker, whose global hooks slow every module and make torch.compile warn."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class _RefuseUncounted(TorchDispatchMode):
    """Raises on an operation that does matrix products inside and has no FLOP formula."""

    supports_higher_order_operators = True
    products_inside = ("attention", "attn", "encoder_layer", "rnn_layer", "lstm", "gru")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "overloadpacket", func)
        if packet not in flop_registry and packet not in EXTRA_FORMULAS:
            name = str(func)
            if any(part in name for part in self.products_inside):
                raise NotImplementedError(
                    f"the ledger knows no FLOP formula for {name} and would count it as zero. Register one with "
                    "torch.utils.flop_counter.register_flop_formula, or use a form that is counted (for recurrent "
                    "layers: matrix products)."
                )
        return func(*args, **(kwargs or {}))


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """q k^T and p v. Masks and causality are not subtracted, as in torch's own formulas."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """q k^T once more, then the gradients of v, p, q and k."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (3 * width + 2 * value[3])


def _projected_attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, width: int, *_: Any, **__: Any
) -> int:
    """torch's fused inference multi-head attention: four projections and the attention between them."""
    batch, length, _width = query
    return batch * (8 * length * width**2 + 4 * length * key[1] * width)


def _encoder_layer_flops(src: torch.Size, width: int, *args: Any, **_: Any) -> int:
    """torch's fused inference encoder layer: the same attention and a feed-forward network of two layers."""
    feed_forward = args[12][0]
    return _projected_attention_flops(src, src, src, width) + 4 * src[0] * src[1] * width * feed_forward


def _matrix_vector_flops(matrix: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _no_products(*_: Any, **__: Any) -> int:
    return 0


def _convolution_backward_flops(
    grad: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: list[bool],
    **_: Any,
) -> int:
    """As much as the forward pass for the gradient of the input, and again for that of the weight."""
    positions = x[2:] if transposed else grad[2:]
    return (output_mask[0] + output_mask[1]) * 2 * x[0] * prod(positions) * prod(weight)


# torch 2.13 has no formula for these operations and counts them as zero; in the gradient of a convolution's weight it
# forgets the groups, and counts a depthwise one as many times as it has channels.
aten = torch.ops.aten
EXTRA_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten._native_multi_head_attention: _projected_attention_flops,
    aten._transformer_encoder_layer_fwd: _encoder_layer_flops,
    aten.convolution_backward: _convolution_backward_flops,
    aten.mv: _matrix_vector_flops,
    aten.dot: _matrix_vector_flops,
    # torch's counter takes apart what it does not know, where it can, and asks by overload: a counted step of SiLU or
    # Mish would differ from a replayed one in the last bit, and a resumed run counts at another step
    aten.silu_backward.default: _no_products,
    aten.mish_backward.default: _no_products,
}

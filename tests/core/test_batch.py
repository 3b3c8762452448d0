import pytest
import torch

from flopwise import endless
from flopwise.core.batch import Examples


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ({"text": ["a", "b"]}, TypeError, r"batch\['text'\]\[0\] is a str"),
        ((torch.ones(2), 3), TypeError, r"batch\[1\] is a int"),
        (None, TypeError, "at least one tensor"),
        ((torch.ones(2), torch.ones(3)), ValueError, r"batch\[0\]: 2, batch\[1\]: 3"),
        ((torch.ones(2), torch.tensor(1.0)), ValueError, r"batch\[1\] has no dimension"),
        (torch.ones(0, 3), ValueError, "at least one example"),
    ],
)
def test_bad_batches_are_named(data, error, says):
    with pytest.raises(error, match=says):
        Examples(data)


def test_examples_are_selected_in_every_tensor_of_any_pytree():
    data = {"x": torch.arange(8).view(4, 2), "more": [torch.arange(4), None]}
    examples = Examples(data)
    assert len(examples) == 4 and examples.data["more"][1] is None
    chosen = examples[torch.tensor([3, 1, 3])]
    assert len(chosen) == 3
    assert chosen.data["x"].tolist() == [[6, 7], [2, 3], [6, 7]]
    assert chosen.data["more"][0].tolist() == [3, 1, 3] and chosen.data["more"][1] is None
    piece = examples[1:30]
    assert len(piece) == 3
    assert piece.data["x"].data_ptr() == data["x"][1:].data_ptr()


def test_selection_happens_on_the_device_of_the_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        drawn = Examples((torch.empty(8, 3, device="cuda"),))[torch.tensor([1, 2])]
        assert drawn.data[0].device.type == drawn.device.type == "cuda"


def test_the_signature_sees_structure_shape_and_dtype_not_values():
    x = torch.ones(2, 3)
    assert Examples((x,)).signature == Examples((x * 5,)).signature
    assert len({Examples(d).signature for d in ((x,), [x], x, (x.double(),), (x[:1],), {"x": x})}) == 6


def test_endless_goes_round_and_refuses_a_used_up_iterator():
    loader = endless([1, 2])
    steps = iter(loader)
    assert [next(steps) for _ in range(5)] == [1, 2, 1, 2, 1]
    used = iter(endless(iter([1])))
    assert next(used) == 1
    with pytest.raises(ValueError, match="used up"):
        next(used)

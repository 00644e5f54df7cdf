"""Tensors that share memory: the average is exact under every name, or it is refused with both names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig, ExponentialMovingAverage
from tests.makers import assert_same


class Shared(nn.Module):
    """Weights that are made to share memory by `share`."""

    def __init__(self, share: Callable[["Shared"], None]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        share(self)


def by_data(model: Shared) -> None:
    model.head.weight.data = model.embedding.weight.data


def by_parameter(model: Shared) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.data)


def frozen(model: Shared) -> None:
    by_data(model)
    model.embedding.weight.requires_grad_(False)


def by_buffer(model: Shared) -> None:
    model.register_buffer("alias", model.embedding.weight.data)


def by_registered_parameter(model: Shared) -> None:
    model.register_buffer("alias", model.embedding.weight)


def by_unpublished_view(model: Shared) -> None:
    model.register_buffer("row", model.embedding.weight.data[1], persistent=False)


def parts_of_one_storage(model: Shared) -> None:
    flat = torch.randn(2, 24)
    model.embedding.weight.data, model.head.weight.data = flat[0].view(6, 4), flat[1].view(6, 4)


def columns_of_one_storage(model: Shared) -> None:
    flat = torch.randn(6, 8)
    model.embedding.weight.data, model.head.weight.data = flat[:, ::2], flat[:, 1::2]


def buffers_that_overlap(model: Shared) -> None:
    table = torch.arange(6.0)
    model.register_buffer("table", table)
    model.register_buffer("first", table[:4])


EXACT = [
    by_data,
    by_parameter,
    frozen,
    by_buffer,
    by_registered_parameter,
    by_unpublished_view,
    parts_of_one_storage,
    columns_of_one_storage,
    buffers_that_overlap,
]


@torch.no_grad()
def step(model: nn.Module) -> None:
    """Move all memory of the model once, also what is shared."""
    storages = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    for tensor in storages.values():
        whole = torch.empty(0).set_(tensor.untyped_storage())
        whole.add_(torch.rand(whole.shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("share", EXACT)
def test_shared_memory_is_exact_in_update_swap_copy_and_state(
    share: Callable[[Shared], None], dtype: str
) -> None:
    model, target = Shared(share), Shared(share)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, dtype=dtype))
    wide = getattr(torch, dtype)
    expected: dict[str, Tensor] = {}
    for iteration in range(3):
        step(model)
        average.update(model, iteration=iteration)
        for name, value in model.state_dict().items():
            copied = share is buffers_that_overlap and name in ("table", "first")
            now = value.clone() if copied else value.to(wide, copy=True)
            expected[name] = now if copied or not iteration else expected[name].lerp(now, 0.5)
    step(model)
    live = {name: value.detach().clone() for name, value in model.state_dict().items()}
    assert_same({n: v for n, v in average.state_dict().items() if "_ema" not in n}, expected)
    published = {name: value.to(live[name].dtype) for name, value in expected.items()}
    with average.swapped_into(model):
        assert_same(dict(model.state_dict()), published)
    assert_same(dict(model.state_dict()), live)
    average.copy_to(target)
    assert_same(dict(target.state_dict()), published)
    again = ExponentialMovingAverage(Shared(share), EMAConfig(decay=0.5, dtype=dtype))
    again.load_state_dict(average.state_dict())
    assert_same(again.state_dict(), average.state_dict())


def a_row(model: Shared) -> None:
    model.row = nn.Parameter(model.embedding.weight.data[2])


def a_row_in_a_buffer(model: Shared) -> None:
    model.register_buffer("row", model.embedding.weight.data[2])


def a_transpose(model: Shared) -> None:
    model.head.weight.data = model.embedding.weight.data.view(4, 6).t()


def another_dtype(model: Shared) -> None:
    model.register_buffer("bits", model.embedding.weight.data.view(torch.int32))


def a_frozen_part(model: Shared) -> None:
    model.row = nn.Parameter(model.embedding.weight.data[2], requires_grad=False)


@pytest.mark.parametrize("share", [a_row, a_row_in_a_buffer, a_transpose, another_dtype, a_frozen_part])
def test_a_part_that_is_shared_is_refused_with_both_names(share: Callable[[Shared], None]) -> None:
    """Each has another average, and only one of them can be in the memory."""
    with pytest.raises(ValueError, match=r"'embedding.weight' and '\S+' share a part of their memory"):
        ExponentialMovingAverage(Shared(share), EMAConfig())
    with pytest.raises(ValueError, match="share a part of their memory"):
        EMABank(Shared(share), {"a": EMAConfig()})


def test_an_expanded_parameter_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.ones(1, 3).expand(2, 3))
    with pytest.raises(ValueError, match="'scale' is an expanded tensor"):
        ExponentialMovingAverage(model, EMAConfig())


def test_memory_that_is_shared_later_is_refused_by_the_swap_and_not_before() -> None:
    model = Shared(lambda _: None)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5))
    average.update(model, iteration=0)
    by_data(model)
    average.update(model, iteration=1)
    live = model.head.weight.detach().clone()
    with (
        pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' share memory"),
        average.swapped_into(model),
    ):
        pass
    assert torch.equal(model.head.weight, live)
    average.update(model, iteration=2)


def test_a_target_that_shares_what_the_average_does_not_is_refused() -> None:
    model, target = Shared(lambda _: None), Shared(by_data)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    before = target.head.weight.detach().clone()
    with pytest.raises(ValueError, match="are tied in the target but not in the average"):
        average.copy_to(target)
    assert torch.equal(target.head.weight, before)


def test_memory_that_is_shared_no_more_is_refused_with_the_names() -> None:
    model = Shared(by_data)
    average = ExponentialMovingAverage(model, EMAConfig())
    average.update(model, iteration=0)
    model.head.weight.data = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="were tied when the average was made"):
        average.update(model, iteration=1)


def test_two_models_that_share_a_parameter_have_exact_averages_and_no_common_swap() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    averages = [ExponentialMovingAverage(model, EMAConfig(decay=0.5)) for model in (one, other)]
    first = one.weight.detach().clone()
    for iteration in range(2):
        for model, average in zip((one, other), averages, strict=True):
            average.update(model, iteration=iteration)
        with torch.no_grad():
            one.weight.add_(1)
    live = one.weight.detach().clone()
    for average in averages:
        assert torch.equal(average.state_dict()["weight"], first.lerp(first + 1, 0.5))
    with averages[0].swapped_into(one):
        inside = one.weight.detach().clone()
        for refused in (
            lambda: averages[1].swapped_into(other).__enter__(),
            lambda: averages[1].update(other, iteration=9),
            lambda: averages[1].copy_to(other),
        ):
            with pytest.raises(RuntimeError, match="swapped into"):
                refused()
        assert torch.equal(one.weight, inside)
    assert torch.equal(one.weight, live)
    with averages[1].swapped_into(other):
        assert torch.equal(one.weight, inside)
    assert torch.equal(other.weight, live)

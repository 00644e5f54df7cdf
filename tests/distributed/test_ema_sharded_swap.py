"""Swapping, copying and measuring sharded averages on real processes, against the same on the whole weights."""

import pytest
import torch

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence, is_swapped
from tests.makers import MODES, Net, full, networks, no_collectives, reshard, shake_both, shard
from tests.ranks import RankPool as Ranks


def swap_after_an_evaluation(layout: str, mode: str) -> None:
    whole, sharded = networks(layout)
    config = {"decay": 0.5}
    reference = ExponentialMovingAverage(whole, EMAConfig(**config))
    average = ExponentialMovingAverage(sharded, EMAConfig(mode=mode, **config))
    for iteration in range(3):
        shake_both(whole, sharded)
        reference.update(whole, iteration=iteration)
        average.update(sharded, iteration=iteration)
    shake_both(whole, sharded)
    whole.eval(), sharded.eval()
    x = torch.randn(6, 5)
    with torch.no_grad():
        live = sharded(x).clone()
        for fails in (False, True):
            try:
                with average.swapped_into(sharded), reference.swapped_into(whole):
                    assert is_swapped(sharded)
                    torch.testing.assert_close(sharded(x), whole(x))
                    assert not torch.allclose(sharded(x), live)
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert torch.equal(sharded(x), live)
    reshard(sharded)
    for left, right in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(full(right), left)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "hsdp"), (2, "none")])
def test_a_swap_right_after_an_evaluation_is_seen_and_undone(
    ranks: Ranks, world: int, layout: str, mode: str
) -> None:
    """FSDP2 leaves the root unsharded after such a forward: what is written there is lost (pytorch#144289)."""
    ranks(world, swap_after_an_evaluation, layout, mode)


def swapping_communicates_nothing() -> None:
    _, model = networks("fsdp")
    for mode in MODES:
        average = ExponentialMovingAverage(model, EMAConfig(mode=mode))
        average.update(model, iteration=0)
        with no_collectives(), average.swapped_into(model):
            pass


def test_a_swap_communicates_nothing_in_either_mode(ranks: Ranks) -> None:
    ranks(2, swapping_communicates_nothing)


def training_goes_on(mode: str) -> None:
    """A step after an evaluation under the average equals the step of a twin that never evaluated."""
    torch.manual_seed(0)
    nets = [shard(Net(), "fsdp") for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]
    average = ExponentialMovingAverage(nets[0], EMAConfig(mode=mode, decay=0.5))
    for iteration in range(3):
        torch.manual_seed(iteration)
        x = torch.randn(6, 5)
        for net, optimizer in zip(nets, optimizers, strict=True):
            net.train()(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        average.update(nets[0], iteration=iteration)
        with torch.no_grad(), average.swapped_into(nets[0]):
            nets[0].eval()(x)
    for left, right in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(full(left), full(right))


@pytest.mark.parametrize("mode", MODES)
def test_the_next_training_step_is_untouched_by_a_swap(ranks: Ranks, mode: str) -> None:
    ranks(2, training_goes_on, mode)


def copies(layout: str, mode: str) -> None:
    whole, sharded = networks(layout)
    average = ExponentialMovingAverage(sharded, EMAConfig(mode=mode, decay=0.5))
    reference = ExponentialMovingAverage(whole, EMAConfig(decay=0.5))
    for iteration in range(3):
        shake_both(whole, sharded)
        average.update(sharded, iteration=iteration)
        reference.update(whole, iteration=iteration)
    expected = reference.state_dict()
    for target in (Net(), shard(Net(), "fsdp"), shard(Net(), layout)):
        with torch.no_grad():
            target.eval()(torch.ones(2, 5))
        average.copy_to(target)
        for name, value in target.state_dict().items():
            assert torch.equal(full(value), expected[name]), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "hsdp")])
def test_copy_to_writes_into_unsharded_and_sharded_targets(
    ranks: Ranks, world: int, layout: str, mode: str
) -> None:
    ranks(world, copies, layout, mode)


def diverges(layout: str, mode: str) -> None:
    whole, sharded = networks(layout)
    configs = {"a": {"decay": 0.9}, "b": {"decay": 0.5, "dtype": "bfloat16"}, "late": {"start_iter": 99}}
    reference = EMABank(whole, {name: EMAConfig(**config) for name, config in configs.items()})
    bank = EMABank(sharded, {name: EMAConfig(mode=mode, **config) for name, config in configs.items()})
    for iteration in range(4):
        shake_both(whole, sharded)
        reference.update(whole, iteration=iteration)
        bank.update(sharded, iteration=iteration)
    with torch.no_grad():
        sharded.eval()(torch.ones(2, 5))
    with no_collectives(expected=1):
        found = divergence(bank, sharded)
    for name, expected in divergence(reference, whole).items():
        assert found[name].rel_l2 == pytest.approx(expected.rel_l2, rel=1e-12)
        assert found[name].cosine == pytest.approx(expected.cosine, rel=1e-12)
        assert found[name].blocks == pytest.approx(expected.blocks, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (2, "none"), (2, "partial")]
)
def test_divergence_is_the_unsharded_value_from_one_all_reduce(
    ranks: Ranks, world: int, layout: str, mode: str
) -> None:
    ranks(world, diverges, layout, mode)


def before_the_start(mode: str) -> None:
    whole, sharded = networks("fsdp")
    average = ExponentialMovingAverage(sharded, EMAConfig(mode=mode, start_iter=100))
    shake_both(whole, sharded)
    average.update(sharded, iteration=0)
    for target in (Net(), shard(Net(), "fsdp")):
        with pytest.warns(UserWarning, match="has not started"):
            average.copy_to(target)
        assert all(
            torch.equal(full(value), whole.state_dict()[n]) for n, value in target.state_dict().items()
        )
    with pytest.warns(UserWarning, match="has not started"), average.swapped_into(sharded):
        for left, right in zip(whole.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(full(right), left)


@pytest.mark.parametrize("mode", MODES)
def test_before_the_start_a_sharded_model_is_published_live(ranks: Ranks, mode: str) -> None:
    ranks(2, before_the_start, mode)

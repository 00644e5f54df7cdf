"""Swapping, copying and measuring sharded averages on real processes, against the same on the whole weights."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ema import EMABank, EMAConfig, ExponentialMovingAverage, divergence, is_swapped
from tests.makers import MODES, Net, assert_same, full, networks, no_collectives, reshard, shake_both, shard
from tests.ranks import RankPool as Ranks

FAILURES = ["in_root", "in_block", "in_backward", "in_training_forward"]


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


class Broken(Net):
    """Fails at a place in its forward or backward."""

    place = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hook = self.blocks[1].register_forward_pre_hook(_fail) if self.place == "in_block" else None
        try:
            y = super().forward(x)
        finally:
            if hook is not None:
                hook.remove()
        if self.place in ("in_root", "in_training_forward"):
            _fail()
        if self.place == "in_backward":
            y.register_hook(_fail)
        return y


def _fail(*_: object) -> None:
    raise RuntimeError("out of memory")


def fails_and_goes_on(layout: str, mode: str, place: str) -> None:
    """A failure inside a swap, or in a training step: the next update and step equal those of a twin without it."""
    torch.manual_seed(0)
    model, twin = shard(Broken(), layout), shard(Net(), layout)
    twin.load_state_dict(model.state_dict())
    pairs = []
    for net in (model, twin):
        average = ExponentialMovingAverage(net, EMAConfig(mode=mode, decay=0.5))
        pairs.append((net, average, torch.optim.AdamW(net.parameters(), lr=0.1)))
    for iteration in range(4):
        for net, average, optimizer in pairs:
            if net is model and iteration == 2:
                _fail_once(model, average, place)
            torch.manual_seed(iteration)
            net.train()(torch.randn(6, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(net, iteration=iteration)
            with average.swapped_into(net):
                pass
    assert_same(dict(model.state_dict()), {n: full(t) for n, t in twin.state_dict().items()})
    theirs = {name: full(tensor) for name, tensor in pairs[1][1].state_dict().items()}
    assert_same({name: full(tensor) for name, tensor in pairs[0][1].state_dict().items()}, theirs)


def _fail_once(model: Broken, average: ExponentialMovingAverage, place: str) -> None:
    live = {name: full(tensor).clone() for name, tensor in model.state_dict().items()}
    model.place = place
    with pytest.raises(RuntimeError, match="out of memory"):
        if place == "in_training_forward":
            model.eval()(torch.ones(2, 5))
        else:
            with average.swapped_into(model):
                model.eval()(torch.ones(2, 5)).sum().backward()
    model.place = ""
    with average.swapped_into(model):
        pass
    assert not is_swapped(model)
    assert_same({name: full(tensor) for name, tensor in model.state_dict().items()}, live)
    model.zero_grad()


@pytest.mark.parametrize("place", FAILURES)
def test_a_failed_forward_or_backward_leaves_the_live_weights(ranks: Ranks, place: str) -> None:
    """FSDP2 stays in the forward that failed, and there it does not register its sharded parameters again."""
    for layout in ("fsdp", "partial"):
        for mode in MODES:
            ranks(2, fails_and_goes_on, layout, mode, place)


def converted(layout: str) -> None:
    torch.manual_seed(0)
    model = shard(Net(), layout)
    average = ExponentialMovingAverage(model, EMAConfig(mode="local_shard", decay=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for iteration in range(2):
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, iteration=iteration)
    live = {name: full(tensor).clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(6, 5)
    with torch.no_grad():
        before = model.eval()(x).clone()
    with average.swapped_into(model):
        model.to(torch.float64)
    with average.swapped_into(model):
        model.load_state_dict({n: t * 2 for n, t in model.state_dict().items()}, assign=True)
    assert_same({name: full(tensor) for name, tensor in model.state_dict().items()}, live)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    model.train()(x).square().sum().backward()
    optimizer.step()
    average.update(model, iteration=2)
    with torch.no_grad():
        assert not torch.equal(model.eval()(x), before)


@pytest.mark.parametrize("layout", ["fsdp", "partial"])
def test_a_conversion_or_assignment_inside_is_undone(ranks: Ranks, layout: str) -> None:
    ranks(2, converted, layout)


def fsdp1() -> None:
    for original in (True, False):
        wrapped = FullyShardedDataParallel(Net(), use_orig_params=original, device_id=torch.device("cpu"))
        for model in (wrapped, wrapped.module, nn.Sequential(wrapped)):
            with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
                ExponentialMovingAverage(model, EMAConfig(mode="local_shard"))
        average = ExponentialMovingAverage(Net(), EMAConfig())
        with pytest.raises(ValueError, match="FSDP1"):
            average.copy_to(wrapped)


def test_fsdp1_is_refused_by_name(ranks: Ranks) -> None:
    ranks(2, fsdp1)

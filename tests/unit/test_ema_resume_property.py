"""A resumed average equals the one that was never interrupted, bit for bit, over all that can be chosen.

Two averages see the same live weights. One is saved at some iterations as a checkpoint would be (`torch.save`, read
back with `weights_only`) and goes on as a new object on a new model. The expected values are the other one's.
"""

import io
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ema import EMAConfig, ExponentialMovingAverage
from ema.rules import Rule


def own_rule(t: int, config: EMAConfig) -> float:
    return min(config.decay, t / (t + 3))


RULES: list[dict[str, object]] = [
    {"type": "constant", "decay": 0.9},
    {"type": "constant", "decay": 0.9, "batch_size": 48, "reference_batch_size": 32},
    {"type": "halflife", "halflife_kimg": 0.02, "batch_size": 4, "rampup_ratio": 0.5},
    {"type": "halflife", "halflife_kimg": 0.02, "batch_size": 4, "rampup_ratio": None},
    {"type": "power", "gamma": 6.94},
    {"type": "power", "sigma_rel": 0.1},
    {"type": "warmup", "decay": 0.6},
    {"type": "debiased", "decay": 0.95},
    {"type": "fraction", "halflife_fraction": 0.3},
    {"rule": "mine.own_rule", "decay": 0.7},
]


@dataclass(frozen=True)
class Step:
    """One call of `update`."""

    gap: int
    """Iterations since the last call."""
    finite: str
    interrupted: bool
    """Whether the run ends after it and is carried on."""


STEPS = st.builds(
    Step,
    gap=st.integers(1, 4),
    finite=st.sampled_from(["taken"] * 4 + ["skipped", "taken on device", "skipped on device"]),
    interrupted=st.booleans(),
)
CONFIGS = st.builds(
    lambda rule, **fields: EMAConfig(**{**rule, **fields}),
    st.sampled_from(RULES),
    start_iter=st.integers(0, 9),
    update_every=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float64", None]),
    average_buffers=st.sampled_from([[], ["1.running_*"]]),
)


def network(dtype: torch.dtype) -> nn.Module:
    """Parameters of odd shapes, a tied one, and buffers of floats and of an integer."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 5)).to(dtype)
    model[3].weight = model[0].weight
    return model


@torch.no_grad()
def train(model: nn.Module, iteration: int) -> None:
    """Live weights that are a function of the iteration alone."""
    generator = torch.Generator().manual_seed(iteration)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.fill_(iteration)


def saved_and_loaded(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return loaded


def run(
    config: EMAConfig, live: torch.dtype, steps: list[Step], *, interruptions: bool
) -> ExponentialMovingAverage:
    """The average after all steps, carried on by new objects where it is interrupted."""
    rule: Rule | None = own_rule if config.rule is not None else None
    model = network(live)
    average = ExponentialMovingAverage(model, config, rule=rule)
    iteration = -1
    for step in steps:
        iteration += step.gap
        train(model, iteration)
        taken = step.finite.startswith("taken")
        finite = torch.tensor(taken) if step.finite.endswith("on device") else taken
        average.update(model, iteration=iteration, finite=finite)
        if interruptions and step.interrupted:
            state = saved_and_loaded(average.state_dict())
            model = network(live)
            average = ExponentialMovingAverage(model, config, rule=rule)
            # Before its start an average is the live weights, and a run restores those too.
            train(model, iteration)
            average.load_state_dict(state)
    return average


def assert_equal(one: ExponentialMovingAverage, other: ExponentialMovingAverage) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype is theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name
    for fact in ("started", "num_updates", "num_skipped", "last_iteration", "decay"):
        assert getattr(one, fact) == getattr(other, fact), fact


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    config=CONFIGS,
    live=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.lists(STEPS, min_size=4, max_size=24),
)
def test_resumed_is_uninterrupted_bit_for_bit(
    config: EMAConfig, live: torch.dtype, steps: list[Step]
) -> None:
    whole = run(config, live, steps, interruptions=False)
    assert_equal(run(config, live, steps, interruptions=True), whole)

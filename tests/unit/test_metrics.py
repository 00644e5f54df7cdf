"""Metrics that the user names: what is refused before anything is called, and what they are called with."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.makers import refusal_of
from trainer.config.schema import Config, EMAGroupConfig, TrainerConfig
from trainer.errors import ConfigError
from trainer.evaluation.custom import is_higher_better, load_metrics, measure
from trainer.evaluation.evaluation import Evaluation
from trainer.evaluation.facts import all_metric_facts, metric_facts, refuse_without_direction
from trainer.evaluation.race import race_of
from trainer.report.runs import read_run
from trainer.seeding import StepRandom
from trainer.tasks.classification import Classification

MODULE = """
import os

def scaled(model, batch, random, scale: float, shift: float = 0.0):
    return batch["x"] * scale + shift

def noise(model, batch, random):
    return random.normal()

def whole(model, batch, random):
    return batch["x"].mean()

def number(model, batch, random):
    return 1.0
"""


class Noise:
    """A task whose loss is two draws of noise."""

    primary_metric = "loss"

    def metrics(self, model, batch, random):
        random.normal()
        return {"loss": random.normal()}


@pytest.fixture(autouse=True)
def my_metrics(tmp_path, monkeypatch):
    (tmp_path / "my_own_metrics.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def load(**nodes):
    return load_metrics(nodes, ["my_own_metrics."])


def values(metrics):
    random = StepRandom(0, 0, count=3, total=3)
    return measure(Noise(), metrics, nn.Identity(), {"x": torch.tensor([1.0, 2.0, 3.0])}, random)


def test_a_report_is_told_which_directions_nobody_declared() -> None:
    node = {"_target_": "my_own_metrics.noise"}
    metrics = load(up=node | {"higher_is_better": True}, down=node | {"higher_is_better": False}, mine=node)
    facts = metric_facts(Evaluation(Classification(), lambda: [], 3, metrics=metrics))
    assert facts["higher_is_better"] == ["accuracy", "up"]
    assert facts["direction_undeclared"] == ["ece", "mine"]  # the task's own biased one, too


def evaluation(**nodes):
    metrics = load(**{name: {"_target_": "my_own_metrics.noise"} | node for name, node in nodes.items()})
    return Evaluation(Classification(), lambda: [], 3, metrics=metrics)


def test_a_metric_that_a_session_drops_keeps_its_direction_and_unit_and_the_last_declaration_wins() -> None:
    rising = {"higher_is_better": True, "unit": "m"}
    before = metric_facts(evaluation(dropped=rising, unclear={}, again=rising, settled={}))
    now = evaluation(again={"higher_is_better": False}, settled={"higher_is_better": True}, new={})
    facts = all_metric_facts(before, now)
    assert facts["higher_is_better"] == ["accuracy", "dropped", "settled"]
    assert facts["direction_undeclared"] == ["ece", "new", "unclear"]
    own = {name: facts["metric_units"].get(name) for name in ("dropped", "again", "settled")}
    assert own == {"dropped": "m", "again": None, "settled": None}
    damaged = {"higher_is_better": None, "direction_undeclared": 3, "metric_units": "m"}
    assert all_metric_facts(damaged, now) == all_metric_facts({}, now) == metric_facts(now)


class Top5(Classification):
    """A task that groups its metrics by a slash."""

    metric_units: ClassVar = {"accuracy/top5": "%"}
    higher_is_better = ("accuracy/top5",)


def test_a_metric_with_a_slash_has_its_unit_direction_and_samples_in_every_set(tmp_path: Path) -> None:
    facts = metric_facts(
        Evaluation(Top5(), lambda: [], 3, sets={"shifted": Evaluation(Top5(), lambda: [], 7)})
    )
    assert facts["metric_units"] == {"accuracy/top5": "%", "shifted/accuracy/top5": "%"}
    assert facts["higher_is_better"] == ["accuracy/top5", "shifted/accuracy/top5"]
    (tmp_path / "meta.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n')
    run = read_run(tmp_path)
    assert (run.eval_samples("accuracy/top5"), run.eval_samples("shifted/accuracy/top5")) == (3, 7)


def test_arguments_unit_and_direction_come_from_the_configuration() -> None:
    node = {"_target_": "my_own_metrics.scaled", "scale": 2, "unit": "m", "higher_is_better": True}
    metrics = load(x=node, y={"_target_": "my_own_metrics.scaled", "scale": 1, "shift": 1})
    assert (metrics["x"].unit, metrics["x"].higher_is_better) == ("m", True)
    assert (metrics["y"].unit, metrics["y"].higher_is_better) == (None, None)
    found = values(metrics)
    assert list(found) == ["loss", "x", "y"]
    assert found["x"].tolist() == [2.0, 4.0, 6.0]
    assert found["y"].tolist() == [2.0, 3.0, 4.0]


def test_every_metric_draws_the_same_numbers_whatever_others_there_are() -> None:
    node = {"_target_": "my_own_metrics.noise"}
    found = values(load(a=node, b=node))
    alone = values({})
    first = StepRandom(0, 0, count=3, total=3).normal()
    assert torch.equal(found["a"], first) and torch.equal(found["b"], first)
    assert torch.equal(found["loss"], alone["loss"]) and not torch.equal(found["loss"], first)


@pytest.mark.parametrize(
    ("name", "node", "expected"),
    [
        ("x", {"_target_": "os.system"}, "metrics.x._target_: 'os.system' is not under my_own_metrics."),
        ("x", {"_target_": "my_own_metrics.os.system"}, "metrics.x._target_: expected a function"),
        ("x", {}, "metrics.x._target_: expected the dotted path"),
        (
            "a",
            {"b": {"_target_": "my_own_metrics.noise"}},
            "metrics.a.b: expected a name without a full stop in front of _target_; call it metrics.a_b",
        ),
        ("x", 3, "metrics.x: expected _target_ and its arguments"),
        ("x", {"_target_": "my_own_metrics.scaled"}, "missing a required argument: 'scale'"),
        ("x", {"_target_": "my_own_metrics.noise", "k": 1}, "got an unexpected keyword argument 'k'"),
        (
            "x",
            {"_target_": "my_own_metrics.noise", "higher_is_beter": True},
            "'higher_is_beter'; did you mean metrics.x.higher_is_better?",
        ),
        ("x", {"_target_": "my_own_metrics.scaled", "scal": 1}, "did you mean metrics.x.scale?"),
        ("x", {"_target_": "my_own_metrics.scaled", "scale": "wide"}, "metrics.x.scale: expected float"),
        ("x", {"_target_": "my_own_metrics.noise", "unit": 3}, "metrics.x.unit: expected text"),
        ("x", {"_target_": "my_own_metrics.noise", "higher_is_better": 1}, "metrics.x.higher_is_better: exp"),
        ("a/b", {"_target_": "my_own_metrics.noise"}, "metrics.a/b: expected a name"),
        ("loss_se", {"_target_": "my_own_metrics.noise"}, "metrics.loss_se: expected a name"),
    ],
)
def test_what_cannot_be_a_metric_is_named(name, node, expected) -> None:
    with pytest.raises(ConfigError) as refused:
        load(**{name: node})
    assert expected in str(refused.value)


def test_a_name_of_the_tasks_own_and_anything_but_a_value_per_sample_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"metrics.loss: the task has a metric of this name"):
        values(load(loss={"_target_": "my_own_metrics.noise"}))
    with pytest.raises(ConfigError, match=r"metrics.x: expected a tensor of shape \(3,\), got \(\)"):
        values(load(x={"_target_": "my_own_metrics.whole"}))
    with pytest.raises(ConfigError, match=r"metrics.x: .* got float"):
        values(load(x={"_target_": "my_own_metrics.number"}))


RACE = TrainerConfig(steps=20, eval_every=5, eval_policy="race")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Config(trainer=RACE), "trainer.eval_policy: expected full"),
        (Config(ema=EMAGroupConfig(axis=3)), "ema.axis: expected 0"),
        (Config(), None),
    ],
)
def test_a_run_that_acts_on_the_best_average_needs_a_direction_of_its_primary_metric(
    config: Config, key: str | None
) -> None:
    """Without one a race kept the average with the lowest accuracy, and eliminated the best."""
    task = Classification()
    task.primary_metric = "mine"

    def judged(**node) -> Evaluation:
        metrics = load(mine={"_target_": "my_own_metrics.noise"} | node)
        return Evaluation(task, lambda: [], 3, metrics=metrics, race=race_of(config.trainer, task, metrics))

    refuse_without_direction(config, judged(higher_is_better=False))
    if key is None:
        refuse_without_direction(config, judged())
    else:
        refusal = refusal_of(refuse_without_direction, config, judged())
        assert refusal.startswith(key) and refusal.endswith("; set metrics.mine.higher_is_better")


def test_a_metric_that_its_task_calls_biased_has_no_direction() -> None:
    assert [is_higher_better(name, Classification(), {}) for name in ("loss", "accuracy", "ece")] == [
        False,
        True,
        None,
    ]

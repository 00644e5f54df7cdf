"""Which sizes of a model follow from the data."""

from typing import Any

import pytest
from torch import nn

from tests.makers import refusal_of
from trainer.config.eval_sets import may_be_trained_on
from trainer.config.facts import sized
from trainer.config.schema import Config
from trainer.protocols import Splits


class Needs(nn.Module):
    def __init__(self, num_classes: int, vocab_size: int = 3) -> None: ...


class MayDoWithout(nn.Module):
    def __init__(self, num_classes: int | None = None) -> None: ...


def sizes(kind: type[nn.Module], facts: dict[str, Any], **model: Any) -> dict[str, Any]:
    config = Config(model={"_target_": f"{__name__}.{kind.__name__}", **model})
    found, _ = sized(config, Splits([], [], facts), [f"{__name__}."])  # type: ignore[arg-type]
    assert config.model == {"_target_": f"{__name__}.{kind.__name__}", **model}
    return {key: value for key, value in found.model.items() if key != "_target_"}


def test_null_takes_the_fact_of_the_data_and_a_number_stays() -> None:
    facts = {"num_classes": 7, "vocab_size": 9}
    assert sizes(Needs, facts, num_classes=None, vocab_size=5) == {"num_classes": 7, "vocab_size": 5}
    assert sizes(Needs, facts, num_classes=None) == {"num_classes": 7}


class Wraps(nn.Module):
    def __init__(self, vocab_size, **others: int) -> None:  # type: ignore[no-untyped-def]
        ...


def test_classes_without_annotations_get_the_facts_too() -> None:
    facts = {"num_classes": 7, "vocab_size": 9}
    assert sizes(Wraps, facts, vocab_size=None, num_classes=None) == {"vocab_size": 9, "num_classes": 7}


def test_null_stays_where_the_class_accepts_it() -> None:
    assert sizes(MayDoWithout, {"num_classes": 7}, num_classes=None) == {"num_classes": None}


@pytest.mark.parametrize("facts", [{}, {"num_classes": "seven"}])
def test_a_size_that_the_data_does_not_give_is_asked_for(facts: dict[str, Any]) -> None:
    message = refusal_of(sizes, Needs, facts, num_classes=None)
    assert message == "model.num_classes: expected a number, because the data does not give it"


def test_a_further_set_with_a_larger_share_of_the_same_data_may_have_training_samples() -> None:
    share = {"_target_": "trainer.data.arrays.arrays", "eval_fraction": 0.1}
    sets = {"more": {"eval_fraction": 0.3}, "less": {"eval_fraction": 0.05}, "far": {"shift": {"image": 1.0}}}
    others = {"own": {"_target_": "trainer.data.digits.digits", "eval_fraction": 0.5}}
    (warning,) = may_be_trained_on(share | {"eval_sets": sets | others})
    assert warning.startswith("data.eval_sets.more.eval_fraction: above data.eval_fraction=0.1")
    assert not may_be_trained_on({"eval_sets": {"more": {"path": "x"}}})
    assert not may_be_trained_on(share | {"eval_fields": {"image": "x.npy"}, "eval_sets": sets})
    fields = {"image": "a.npy"}
    others = {"wiki": {"fields": {"image": "b.npy"}, "eval_fraction": 0.9}}
    assert not may_be_trained_on(share | {"fields": fields, "eval_sets": others})
    same = {"same": {"fields": fields, "transforms": [], "eval_fraction": 0.9}}
    assert len(may_be_trained_on(share | {"fields": fields, "eval_sets": same})) == 1


def test_a_further_set_that_keeps_a_share_beside_a_split_of_its_own_has_training_samples() -> None:
    data = {"path": "a", "eval_path": "b", "eval_fraction": 0.1}
    sets = {"in": {"eval_path": None}, "out": {"eval_path": "c"}, "far": {"path": "c", "eval_path": None}}
    assert may_be_trained_on(data | {"eval_sets": sets}) == [
        "data.eval_sets.in: its share of the data has samples that the run is trained on, because data.eval_path is set"
    ]

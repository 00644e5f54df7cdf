"""An error of one rank, while another rank waits in a collective: it is raised, not kept in a gather without answer."""

import pytest
import torch.distributed as dist

from trainer.distributed import processes
from trainer.distributed.processes import AGREEING, agreeing
from trainer.distributed.roll_call import RollCall
from trainer.errors import ConfigError


def two_ranks() -> list[RollCall]:
    store = dist.HashStore()
    return [RollCall(store, rank, 2) for rank in range(2)]


def test_others_are_at_a_place_when_all_of_them_have_arrived() -> None:
    first, second = two_ranks()
    for _ in range(2):  # the second time, the first rank is seen where it was the first time
        second.arrive("the end")
        assert not second.others_are_at("the end", 0.0)
        first.arrive("the end")
        assert second.others_are_at("the end", 0.0)
    first.arrive("outside")
    assert not second.others_are_at("the end", 0.0)


def test_a_rank_raises_its_error_alone_while_another_waits_in_a_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = two_ranks()
    first.arrive("building the model")
    monkeypatch.setattr(processes, "_roll_call", second)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "AGREEING_PATIENCE_S", 0.0)
    gathered: list[object] = []
    monkeypatch.setattr(
        processes, "gather", lambda value, group=None: gathered.append(value) or [None, value]
    )
    with pytest.raises(ConfigError, match="no"), agreeing("building the model", collectives=True):
        raise ConfigError("no")
    assert not gathered
    first.arrive("outside")
    first.arrive("building the model")
    first.arrive("building the model")
    first.arrive(AGREEING)
    with pytest.raises(ConfigError, match="no"), agreeing("building the model", collectives=True):
        raise ConfigError("no")
    assert len(gathered) == 1

"""The benchmarks of the averages run, on models so small that their times mean nothing.

What is checked is that every contender does the same work and that the figures are what they are called. The numbers
are counts of bytes and tensors, and slopes of curves that were made up.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.benchmarks import bench_ema, bench_ema_ranks, bench_ema_speed
from tests.benchmarks.bench_ema_bank import allocated, allocation, bank, quickstart
from tests.benchmarks.bench_ema_figures import Figure, Target
from tests.benchmarks.bench_ema_growth import growth, slope
from tests.benchmarks.bench_ema_models import Tree, count
from tests.benchmarks.bench_ema_sharded import GATHERED, SHARDED, on_rank
from tests.benchmarks.bench_ema_speed import OURS, Comparison, begin, hopeless, large, small
from tests.benchmarks.bench_ema_teacher import teacher
from tests.benchmarks.ema_peers import PEERS, Make, Peer, ours
from tests.benchmarks.rounds import Spread, interleave

pytestmark = pytest.mark.slow  # left out of `make quick`

PACKAGES = {
    "ema-pytorch": "ema_pytorch",
    "diffusers": "diffusers",
    "torch-ema": "torch_ema",
    "Lightning": "lightning",
}
BY_HAND = {name: make for name, make in PEERS.items() if "restated" in name or name.startswith("torch Av")}
CANNOT_WIDEN = ("torch AveragedModel, foreach", "Lightning EMAWeightAveraging", "timm ModelEmaV3, restated")


def package(name: str) -> str:
    """The module that a peer needs."""
    return next((module for start, module in PACKAGES.items() if name.startswith(start)), "torch")


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.what: figure for figure in figures}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_averages_as_ours_does(name: str) -> None:
    pytest.importorskip(package(name))
    at_work, cannot = begin(Tree(10, 12), {OURS: ours, name: PEERS[name]}, False)
    assert list(at_work) == [OURS, name]
    assert cannot == {}


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_keeps_a_float32_shadow_of_bfloat16_or_says_why_not(name: str) -> None:
    pytest.importorskip(package(name))
    at_work, cannot = begin(Tree(10, 12).bfloat16(), {OURS: ours, name: PEERS[name]}, True)
    assert list(cannot) == ([name] if name in CANNOT_WIDEN else [])
    assert all(tensor.dtype == torch.float32 for peer in at_work.values() for tensor in peer.average())


def late(model: nn.Module, float32: bool) -> Peer:
    """Misses its second update."""
    peer, done = ours(model), 0

    def update() -> None:
        nonlocal done
        done += 1
        if done != 2:
            peer.update()

    return Peer(update, peer.average)


def test_a_peer_that_does_other_work_is_refused() -> None:
    with pytest.raises(SystemExit, match="late: its average is"):
        begin(Tree(10, 12), {OURS: ours, "late": late}, False)


def test_a_fault_of_ours_is_not_taken_for_a_peer_that_cannot() -> None:
    def failing(model: nn.Module, float32: bool) -> Peer:
        def update() -> None:
            raise ValueError("mine")

        return Peer(update, list)

    with pytest.raises(ValueError, match="mine"):
        begin(Tree(10, 12), {OURS: failing}, False)


def test_small_tensors_are_timed_against_every_peer_and_bound() -> None:
    found = by_name(small(1, 2, Tree(10, 12), BY_HAND))
    peers = {f"peer: {name}" for name in BY_HAND}
    assert {name for name in found if name.startswith("peer")} == peers
    assert sum(name.startswith("bound") for name in found) == 3
    verdict = found["fastest peer / ours"]
    assert isinstance(verdict.value, Spread)
    assert verdict.value.median == min(found[name].value.median for name in peers)  # type: ignore[union-attr]
    assert verdict.target == Target(12, at_least=True)


def test_large_tensors_are_timed_in_both_dtypes_and_those_who_cannot_say_so() -> None:
    found = large(1, 2, {"tiny": lambda: Tree(10, 12)}, BY_HAND)
    assert {figure.setting for figure in found} == {"120 float32, 1 thread", "120 bfloat16, 1 thread"}
    cannot = {figure.what for figure in found if figure.text().startswith("cannot")}
    assert cannot == {f"peer: {name}" for name in BY_HAND if name in CANNOT_WIDEN}


def timed(over_ours: dict[str, float]) -> Comparison:
    """What rounds would have found in which a peer took so many times as long as ours."""
    found = Comparison()
    found.add({OURS: [1.0, 1.0], **{name: [over, over] for name, over in over_ours.items()}})
    return found


def test_a_peer_far_behind_is_left_out_of_the_next_larger_model(monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"slow": 9.0, "even": 1.0}

    def compare(model: nn.Module, peers: dict[str, Make], bounds: dict[str, object], **_: int) -> Comparison:
        return timed({name: over[name] for name in peers} | dict.fromkeys(bounds, 1.0))

    monkeypatch.setattr(bench_ema_speed, "compare", compare)
    makes: dict[str, Make] = {"slow": ours, "even": ours}
    found = large(1, 2, {"tiny": lambda: Tree(10, 12), "larger": lambda: Tree(10, 24)}, makes)
    texts = [figure.text() for figure in found if figure.what == "peer: slow"]
    assert [text.startswith("left out: 9.0 x ours") for text in texts] == [False, True, False, True]


def test_the_fastest_peer_is_never_left_out_however_slow() -> None:
    found = timed({"slow": 9.0, "slower": 10.0})
    assert list(hopeless(found, {"slow": ours, "slower": ours})) == ["slower"]


def test_a_peer_that_is_not_installed_is_named() -> None:
    def missing(model: nn.Module, float32: bool) -> Peer:
        raise ModuleNotFoundError("No module named 'nowhere'")

    makes: dict[str, Make] = {"missing": missing, "late?": lambda model, float32: ours(model)}
    assert (
        by_name(small(1, 2, Tree(10, 12), makes))["peer: missing"].text()
        == "cannot: No module named 'nowhere'"
    )


def test_calls_take_turns_and_short_ones_are_repeated() -> None:
    calls: list[str] = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, turn_s=1e-4)
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}
    assert len(calls) > 2 * 3 + 4


def test_ranks_are_timed_one_after_another_and_drawn(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    found = ranks(2, bench_ema_ranks.on_rank, 2, True)
    assert [len(pairs) for pairs in found] == [2, 2] and all(
        min(pair) > 0 for pairs in found for pair in pairs
    )
    spreads = {world: Spread.of([ours for ours, _ in pairs]) for world, pairs in enumerate(found, 1)}
    bench_ema_ranks.draw(tmp_path / "ranks.png", spreads)
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_sharded_updates_are_counted_timed_and_weighed(ranks: Callable[..., list[Any]]) -> None:
    for found in ranks(2, on_rank, 2, True):
        assert found["collectives"] == {SHARDED: 0, GATHERED: 16}  # one for each parameter
        assert found["bytes"] == found["fair_bytes"] == 4 * 16 * 1024 / 2
        assert {name: len(own) for name, own in found["times"].items()} == {SHARDED: 2, GATHERED: 2}


def test_a_bank_is_timed_with_its_walk() -> None:
    found = by_name(bank(1, 2, {"tiny": lambda: Tree(10, 12)}))
    assert [what for what, figure in found.items() if figure.target] == [
        "(a bank of 8 + 7 walks) / 8 times an average",
        "(a bank of 8 + 7 walks) / 8 averages of their own",
    ]


def test_a_bank_is_timed_in_the_quickstart() -> None:
    found = quickstart(1, 2, ("model.n_layer=1", "model.n_embd=16", "trainer.global_batch_size=2"))
    assert found[-1].target == Target(3.0)
    assert found[-1].unit == "%"


def test_allocated_bytes_are_counted_whether_kept_or_not() -> None:
    kept: list[torch.Tensor] = []
    assert allocated(lambda: torch.empty(1000)) == (4000, 0)
    assert allocated(lambda: kept.append(torch.empty(1000))) == (4000, 4000)


def test_updates_of_ours_allocate_nothing() -> None:
    found = allocation(1, 2, {"small": lambda: Tree(20, 1000)}, {})
    targets = [figure for figure in found if figure.target]
    assert len(targets) == 4
    assert [figure.value for figure in targets] == [0.0] * 4


def test_growth_is_drawn_and_judged(tmp_path: Path) -> None:
    found = growth(1, 2, tmp_path / "growth.png", parameters=[1000, 2000, 4000], tensors=[3, 9, 27])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert sum(figure.target is not None for figure in found) == 2


def test_the_slope_is_the_exponent_of_the_upper_half() -> None:
    sizes = [1, 10, 100, 1000, 10_000]
    assert slope(sizes, [7.0, 7.0, *(size**1.5 for size in sizes[2:])]) == pytest.approx(1.5)


def test_a_tree_has_the_tensors_it_was_asked_for() -> None:
    for tensors in (3, 8, 1601):
        model = Tree(tensors, 10)
        assert len(list(model.parameters())) == tensors
        assert count(model) == 10 * tensors


def test_the_command_prints_one_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def section(threads: int, rounds: int) -> list[Figure]:
        seen.append((threads, rounds))
        return [
            Figure("here", "ratio", Spread(1.0, 2.0, 3.0), target=Target(1.5)),
            Figure("here", "none", note="cannot: x"),
        ]

    monkeypatch.setattr(bench_ema, "keep_freed_memory", lambda: None)
    monkeypatch.setitem(bench_ema.SECTIONS, "small", section)
    bench_ema.main(["--only", "small", "--rounds", "4", "--json", str(tmp_path / "found.json")])
    assert seen == [(1, 4), (2, 4)]
    assert "at most 1.5: missed" in capsys.readouterr().out
    (first, second, *_) = json.loads((tmp_path / "found.json").read_text())["sections"]["small"]
    assert (first["value"], first["met"]) == ({"low": 1.0, "median": 2.0, "high": 3.0}, False)
    assert (second["note"], second["met"]) == ("cannot: x", None)


def test_a_teacher_is_timed_against_a_live_forward() -> None:
    found = by_name(teacher(1, 2, {"tiny": lambda: (torch.nn.Linear(8, 8), torch.ones(2, 8))}))
    assert found["a teacher forward / a live forward"].target == Target(1.1)
    assert found["more memory than a live forward"].value == 0

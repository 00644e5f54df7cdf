"""A checkpoint is whole or it is none, and comes back bit for bit. One process; numbers are the saved ones."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.makers import assert_same, save_checkpoint
from trainer.checkpoint import writing as checkpoint
from trainer.checkpoint.store import (
    TensorReader,
    load_checkpoint,
    newest_checkpoint,
    stored_scalars,
    stored_tensors,
)
from trainer.errors import ConfigError


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "a.weight": torch.randn(3, 5, generator=generator),
            "a.half": torch.randn(7, generator=generator).bfloat16(),
            "transposed": torch.randn(4, 2, generator=generator).t(),
            "num_batches": torch.tensor(11 + seed),
            "empty": torch.empty(0, 3),
        },
        "ema": {"0.999": {"started": True, "updates": 3 + seed, "rule": [0.1, None], "x": torch.ones(2, 2)}},
        "step": 7,
        "ratio": 0.1 + 0.2,
    }


def tensors_of(nested: dict[str, Any]) -> list[torch.Tensor]:
    leaves = [tensors_of(v) if isinstance(v, dict) else [v] for v in nested.values()]
    return [leaf for part in leaves for leaf in part if isinstance(leaf, torch.Tensor)]


def test_round_trip_is_exact_and_in_place(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 500, state(), keep=1)
    assert path == tmp_path / "checkpoints" / "step-00000500"
    target = state(seed=1)
    before = [tensor.data_ptr() for tensor in tensors_of(target)]
    loaded = load_checkpoint(path, target)
    assert_same(loaded, state())
    assert [tensor.data_ptr() for tensor in tensors_of(target)] == before
    assert target["step"] == 7 and loaded["model"]["a.weight"] is target["model"]["a.weight"]


def test_a_reader_gives_each_tensor_whole_and_names_what_is_not_there(tmp_path: Path) -> None:
    reader = TensorReader(save_checkpoint(tmp_path, 500, state(), keep=1))
    for name, tensor in state()["model"].items():
        found = reader.read(f"model/{name}")
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    with pytest.raises(ConfigError, match=r"has no tensor model/b\.weight"):
        reader.read("model/b.weight")


@pytest.mark.parametrize("name", [".metadata", "state.json", "__0_0.distcp"])
def test_a_reader_refuses_a_damaged_file(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, 500, state(), keep=1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=rf"{name} is damaged"):
        TensorReader(path).read("model/a.weight")


def test_large_tensor_behind_a_small_view_is_not_stored(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"view": torch.zeros(1_000_000)[:3]}, keep=1)
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


def test_parameters_load_under_autograd(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    path = save_checkpoint(tmp_path, 1, {"w": weight}, keep=1)
    target = torch.nn.Parameter(torch.zeros(3))
    load_checkpoint(path, {"w": target})
    assert torch.equal(target, weight) and target.requires_grad and target.grad_fn is None


def test_what_is_stored_can_be_listed_without_loading(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(), keep=1)
    listed = stored_tensors(path)
    assert listed.keys() == {*(f"model/{name}" for name in state()["model"]), "ema/0.999/x"}
    assert listed["model/a.half"].dtype == torch.bfloat16 and listed["model/a.half"].shape == (7,)
    assert stored_scalars(path)["ema"] == {"0.999": {"started": True, "updates": 3, "rule": [0.1, None]}}


def test_a_checkpoint_that_another_replaced_is_read_anew(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run", 500, {"x": torch.zeros(3)}, keep=1)
    assert stored_tensors(path)["x"].shape == (3,)
    shutil.rmtree(path)
    os.rename(save_checkpoint(tmp_path / "other", 500, {"x": torch.zeros(4)}, keep=1), path)
    assert stored_tensors(path)["x"].shape == (4,)


def test_part_of_a_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(), keep=1)
    x = torch.zeros(2, 2)
    assert load_checkpoint(path, {"ema": {"0.999": {"x": x}}})["ema"]["0.999"]["updates"] == 3
    assert torch.equal(x, torch.ones(2, 2))
    assert load_checkpoint(path, {})["step"] == 7


def test_missing_tensor_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(), keep=1)
    target = state(seed=1)
    target["model"]["b.bias"] = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"^/.* has no tensor model/b\.bias$"):
        load_checkpoint(path, target)
    del target["model"]["b.bias"]
    assert_same(target, state(seed=1))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(5, 3), r"shape \(3, 5\), expected \(5, 3\)"),
        (torch.zeros(1, 3, 5), r"shape \(3, 5\), expected \(1, 3, 5\)"),
        (torch.zeros(3, 5).half(), r"dtype torch\.float32, expected torch\.float16"),
    ],
)
def test_other_shape_or_dtype_is_named_and_nothing_is_loaded(
    tmp_path: Path, tensor: torch.Tensor, what: str
) -> None:
    path = save_checkpoint(tmp_path, 1, state(), keep=1)
    other = torch.zeros(7).bfloat16()
    with pytest.raises(ConfigError, match=rf"^{path}: model/a\.weight has {what}$"):
        load_checkpoint(path, {"model": {"a.half": other, "a.weight": tensor}})
    assert not other.any()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            {"a": {"b/c": torch.zeros(1)}, "a/b": {"c": torch.zeros(1)}},
            ValueError,
            "two tensors are named a/b/c",
        ),
        ({"a": {3: torch.zeros(1)}}, TypeError, "key a/3 is a int; expected a string"),
        ({"a": {"b": object()}}, TypeError, "a/b is a object; expected a tensor or a JSON value"),
        ({"a": [torch.zeros(1)]}, TypeError, "a is a list; expected a tensor or a JSON value"),
    ],
)
def test_state_that_cannot_be_stored_is_refused_by_name(
    tmp_path: Path, bad: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "checkpoints", 1, bad, keep=1)
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_newest_is_by_step_and_old_ones_are_pruned(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (99_999_999, 5, 100_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-100000000"
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "step-mine").mkdir()
    for step in (100_000_001, 100_000_002):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    expected = ["notes.txt", "step-100000001", "step-100000002", "step-mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_checkpoint_just_written_is_never_pruned(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 20, {"step": 20}, keep=1)
    save_checkpoint(tmp_path, 10, {"step": 10}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_step_that_is_committed_is_left_as_it_is(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 20, state(), keep=1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert save_checkpoint(tmp_path, 20, state(seed=1), keep=1) == path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("moment", ["while writing", "before the marker"])
def test_crash_before_the_marker_falls_back_to_the_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    older = save_checkpoint(tmp_path, 10, state(), keep=2)
    function, failing = {
        "while writing": ("_write", lambda *_: 1 / 0),
        "before the marker": ("write_atomically", None),
    }[moment]
    write = checkpoint.write_atomically

    def write_but_no_marker(path: Path, text: str, **options: bool) -> None:
        if path.name == "COMMIT.json":
            raise ZeroDivisionError
        write(path, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, failing or write_but_no_marker)
        with pytest.raises(ZeroDivisionError):
            save_checkpoint(tmp_path, 20, state(seed=1), keep=2)
    left = "step-00000020.tmp" if moment == "while writing" else "step-00000020"
    assert (tmp_path / left).is_dir()
    assert newest_checkpoint(tmp_path) == older
    assert_same(load_checkpoint(older, state(seed=2)), state())
    if moment == "before the marker":
        with pytest.raises(ConfigError, match=r"no committed checkpoint: it has no COMMIT\.json"):
            load_checkpoint(tmp_path / left, state())
    newer = save_checkpoint(tmp_path, 30, state(seed=3), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [older.name, newer.name]


def test_pruning_takes_the_marker_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save_checkpoint(tmp_path, 10, {"step": 10}, keep=1)
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: seen.append(sorted(os.listdir(path))))
    save_checkpoint(tmp_path, 20, {"step": 20}, keep=1)
    assert old.is_dir() and seen and "COMMIT.json" not in seen[0] and "state.json" in seen[0]
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000020"


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, os.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
def test_damaged_file_is_named_and_nothing_is_loaded(tmp_path: Path, name: str, damage: Any) -> None:
    path = save_checkpoint(tmp_path, 10, state(), keep=1)
    damage(path / name)
    target = state(seed=1)
    with pytest.raises(ConfigError, match=rf"^{path}/{name} [^;]*$") as caught:
        load_checkpoint(path, target)
    assert "\n" not in str(caught.value)
    assert_same(target, state(seed=1))


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}', '{"files": {"a": {"bytes": "x", "crc32": 0}}}'])
def test_damaged_marker_is_named(tmp_path: Path, text: str) -> None:
    path = save_checkpoint(tmp_path, 10, state(), keep=1)
    (path / "COMMIT.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"^{path}.*COMMIT\.json"):
        load_checkpoint(path, state())


def test_marker_lists_every_file_and_the_index_no_path_of_this_machine(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 10, state(), keep=1)
    marker = json.loads((path / "COMMIT.json").read_text())
    assert marker["step"] == 10
    assert {*marker["files"], "COMMIT.json"} == {file.name for file in path.iterdir()}
    assert str(tmp_path).encode() not in (path / ".metadata").read_bytes()


def test_run_directory_may_be_moved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "here", 10, state(), keep=1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert_same(load_checkpoint(tmp_path / "there" / "step-00000010", state(seed=1)), state())


def test_standard_tools_read_the_tensors(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 10, state(), keep=1)
    target = {"model/a.weight": torch.zeros(3, 5)}
    torch.distributed.checkpoint.load(target, checkpoint_id=path, no_dist=True)
    assert torch.equal(target["model/a.weight"], state()["model"]["a.weight"])

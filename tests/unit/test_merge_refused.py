"""Merges that are refused: one line names the checkpoint or the key, the exit code is 2, and no file is left."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import launch.merging.weights
from ema import EMAConfig, ExponentialMovingAverage
from launch.merge import main
from launch.merging.writing import write_file
from tests.exports import Tied, save_run
from tests.makers import make_run_dir, save_checkpoint
from trainer.errors import ConfigError

Change = Callable[[Path], object]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with three checkpoints."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        save_file({"a": torch.ones(2), "b": torch.ones(2, 3)}, f"step_{step}.safetensors")
    return tmp_path


def assert_refused(capsys: pytest.CaptureFixture[str], expected: str, *arguments: str) -> None:
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert expected in error
    assert sorted(Path().rglob("*")) == before


LINEAR = ("profile=linear", "out=m.safetensors")
ALL = "step_*.safetensors"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((ALL, *LINEAR, "window=4"), "window: expected at least 4 checkpoints, found 3"),
        (
            ("step_1*.safetensors", *LINEAR),
            "profile: expected at least two checkpoints to merge, found step_1",
        ),
        ((ALL, *LINEAR, "window=0"), "window: expected a whole number of at least 1"),
        ((ALL, "window=3", "coefficients=[1,0,0]", "out=m"), "window: expected with profile="),
        ((ALL, "out=m.safetensors"), "profile: expected either profile= or coefficients="),
        ((ALL, *LINEAR, "coefficients=[1]"), "profile: expected either profile= or coefficients="),
        ((ALL, "profile=", "out=m"), "profile: expected one of constant, cosine, wsd, minus_sqrt"),
        ((ALL, "profile=_done", "out=m"), "profile: expected one of"),
        (
            (ALL, "profile=power:0.5", "out=m"),
            "profile: power: expected a number in (0, 0.2887), got 0.5",
        ),
        ((ALL, "profile=decay:x", "out=m"), "profile: decay: expected a number, got x"),
        ((ALL, "profile=no.txt", "out=m"), "profile: no.txt cannot be read: No such file"),
        ((ALL, "coefficients=[0.5,0.5]", "out=m"), "coefficients: expected 3, one a checkpoint, got 2"),
        ((ALL, "coefficients=[0.5,0.4,0]", "out=m"), "coefficients: expected sum 1, got 0.9"),
        ((ALL, "coefficients=[nan,1,0]", "out=m"), "coefficients: expected numbers"),
        ((ALL, "coefficients=1", "out=m"), "coefficients: expected numbers"),
        (("none_*", *LINEAR), "none_* matches no file or folder"),
        (("none_1", *LINEAR), "none_1 does not exist"),
        ((ALL, *LINEAR, "windw=3"), "windw: unknown key"),
        ((ALL, "step_1.safetensors", *LINEAR), "step_1.safetensors is named twice"),
        (LINEAR, "expected checkpoints, got none"),
        ((ALL, "profile=linear", "out=m.pt"), "out: expected FILE.safetensors or FOLDER/"),
        ((ALL, "profile=linear", "out=step_1.safetensors"), "out: step_1.safetensors exists already"),
        ((ALL, *LINEAR, "evaluate=nowhere"), "nowhere"),
    ],
)
def test_bad_arguments_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], expected: str
) -> None:
    assert_refused(capsys, expected, *arguments)


@pytest.mark.parametrize(
    "names",
    [("a", "b"), ("a_1_x_2", "a_2_x_1"), ("v1", "v2_final_3"), ("step=1-step=2", "step=2-step=1")],
)
def test_an_unknown_order_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...]
) -> None:
    files = [f"{name}.safetensors" for name in names]
    for file in files:
        shutil.copy("step_1.safetensors", file)
    assert_refused(capsys, "the order of the checkpoints is unknown", *files, *LINEAR)


def test_one_checkpoint_is_named_with_two_sets_of_weights(here: Path) -> None:
    torch.save({"live": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, "both_4.pt")
    assert main(["both_4.pt:live", "both_4.pt:ema", "coefficients=[0.25,0.75]", "out=m.safetensors"]) == 0
    assert load_file("m.safetensors")["a"].tolist() == [0.75, 0.75]


def test_a_decay_that_has_not_begun_is_noted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([ALL, "profile=wsd", "out=m.safetensors"]) == 0
    assert "note: wsd: only the newest checkpoint counts" in capsys.readouterr().out


def test_the_same_step_twice_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("step_1.safetensors", "step_01.safetensors")
    assert_refused(capsys, "both have step 1", ALL, *LINEAR)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": torch.ones(2)}, "step_2.safetensors has no tensor b, which step_3.safetensors has"),
        (
            {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(1)},
            "step_3.safetensors has no tensor c, which step_2.safetensors has",
        ),
        (
            {"a": torch.ones(2), "b": torch.ones(3, 2)},
            "step_2.safetensors: b has shape (3, 2), and in step_3.safetensors (2, 3)",
        ),
        (
            {"a": torch.ones(2).half(), "b": torch.ones(2, 3)},
            "step_2.safetensors: a has dtype float16, and in step_3.safetensors float32",
        ),
        (
            {"a": torch.tensor([1, torch.nan]), "b": torch.ones(2, 3)},
            "step_2.safetensors: a has a value that is not finite",
        ),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "nan"],
)
def test_the_first_tensor_that_does_not_agree_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], tensors: dict[str, Any], expected: str
) -> None:
    save_file(tensors, "step_2.safetensors")
    assert_refused(capsys, expected, ALL, *LINEAR)


def test_a_dtype_that_the_result_cannot_have_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 8):
        torch.save({"a": torch.ones(2, dtype=torch.complex128)}, f"wide_{step}.pt")
    assert_refused(
        capsys, "wide_8.pt: a has dtype complex128; expected one of bool, uint8", "wide_*", *LINEAR
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_source_that_changes_while_it_is_merged_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    written = launch.merging.weights.write_file

    def meanwhile(*arguments: Any, **named: Any) -> None:
        if when == "after":
            written(*arguments, **named)
        save_file({"a": torch.ones(1), "b": torch.ones(1, 3)}, "step_2.safetensors")
        if when == "before":
            written(*arguments, **named)

    monkeypatch.setattr(launch.merging.weights, "write_file", meanwhile)
    assert_refused(capsys, "step_2.safetensors was changed while it was read", ALL, *LINEAR)


def test_a_sum_that_the_dtype_cannot_hold_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, value in ((7, 60000.0), (8, -60000.0)):
        save_file({"a": torch.full((2,), value).half()}, f"half_{step}.safetensors")
    files = ("half_*", "coefficients=[2,-1]", "out=m.safetensors")
    assert_refused(capsys, "a: the sum has the value 1.8e+05, too large", *files)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flipped(path: Path) -> None:
    """A file of `torch.save` in which one bit of a number is another."""
    torch.save({"a": torch.full((2,), 0.123), "b": torch.ones(2, 3)}, path)
    number = torch.full((1,), 0.123).numpy().tobytes()
    content = path.read_bytes()
    assert number in content
    path.write_bytes(content.replace(number, bytes([number[0] ^ 1]) + number[1:], 1))


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("step_2.safetensors", cut, "step_2.safetensors is no complete safetensors file"),
        ("step_2.safetensors", lambda path: path.write_bytes(b""), "is no complete safetensors file"),
        ("step_2.safetensors", lambda path: (path.unlink(), os.mkfifo(path)), "this is a pipe"),
        ("step_2.safetensors", lambda path: (path.unlink(), path.symlink_to("gone")), "does not exist"),
        ("step_4.pt", lambda path: path.write_bytes(b"PK\x03\x04rest"), "step_4.pt cannot be read"),
        ("step_4.pt", lambda path: torch.save(Tied(), path), "step_4.pt has objects other than tensors"),
        ("step_4.pt", flipped, "step_4.pt is damaged: the record step_4/data/0 does not"),
        ("step_4", os.mkdir, "step_4 has no weights"),
    ],
)
def test_what_is_no_whole_checkpoint_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, make: Change, expected: str
) -> None:
    files = ["step_1.safetensors", "step_3.safetensors", name]
    make(here / name)
    assert_refused(capsys, expected, *files, *LINEAR)


def test_a_shard_that_is_missing_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        folder = here / f"checkpoint-{step}"
        folder.mkdir()
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    assert_refused(capsys, "checkpoint-10/model-2.safetensors does not exist", "checkpoint-*", *LINEAR)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "COMMIT.json").unlink(), "is no committed checkpoint"),
        (lambda folder: cut(next(folder.glob("*.distcp"))), "distcp"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "distcp is missing"),
        (lambda folder: (folder / ".metadata").write_bytes(b"x"), ".metadata"),
    ],
)
def test_a_damaged_checkpoint_of_a_run_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Change,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path, Tied(), steps=(2, 4))
    damage(Path("run/checkpoints/step-00000002"))
    assert_refused(capsys, expected, "run/checkpoints/step-*", *LINEAR)
    assert_refused(capsys, "step-00000002", "run", *LINEAR)


def test_a_run_without_checkpoints_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run_dir("run")
    assert_refused(capsys, "run is a run directory without checkpoints", "run", *LINEAR)


def test_an_average_that_a_checkpoint_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path, Tied(), steps=(2, 4), start_iter=3)
    assert_refused(capsys, "expected one of live, ema/0.5", "run/checkpoints/step-*:ema/0.9", *LINEAR)
    assert_refused(capsys, "ema/0.5 had not started at step 2", "run/checkpoints/step-*:ema/0.5", *LINEAR)


def test_an_error_while_writing_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = launch.merging.weights.write_file

    def full(path: Path, *arguments: Any, **named: Any) -> None:
        written(path, *arguments, **named)
        if path.name.startswith("m-00002"):
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(launch.merging.weights, "write_file", full)
    before = sorted(Path().rglob("*"))
    assert main([ALL, *LINEAR, "max_shard_size=8"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("size", [9, 9999])
def test_what_does_not_fit_on_the_disk_names_the_argument(tmp_path: Path, size: int) -> None:
    """A limit of the process stands for the disk's."""
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"^export: x\.safetensors cannot be written: File too large$"):
            tensors = {"w": torch.empty(size, device="meta")}
            write_file(path, tensors, lambda _: iter([torch.ones(size)]), {}, key="export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("group")
def test_snapshots_without_a_model_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = {"step": 1, "skipped": 0, "averages": ["a"]}
    module = torch.nn.Linear(2, 1)
    average = ExponentialMovingAverage(module, EMAConfig(decay=0.9))
    average.update(module, iteration=1)
    for step in (1, 2):
        state = {"ema": {"a": average.state_dict()}, "progress": {**progress, "step": step}}
        save_checkpoint(here / "snapshots", step, state, keep=9)
    words = [f"snapshots/step-0000000{step}:ema/a" for step in (1, 2)]
    assert_refused(capsys, "expected a checkpoint with a model; polyak posthoc combines", *words, *LINEAR)

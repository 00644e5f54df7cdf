"""What an export holds. The expected values are the tensors of the average and of the model that the checkpoint was
saved from; `load_model` of safetensors is the judge of names and ties.
"""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor

import launch.exporting.weights
from launch.exporting.files import Destination
from launch.exporting.loading import python_lines
from launch.exporting.weights import match_names
from tests.exports import Counting, Tied, Wrapper, export, save_run
from trainer.checkpoint.store import TensorReader
from trainer.config.schema import EMAGroupConfig
from trainer.errors import ConfigError


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_an_average_is_exported_bit_for_bit_with_buffers_and_frozen_parameters(tmp_path: Path) -> None:
    model = Tied()
    run_dir, bank = save_run(tmp_path, model)
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 0
    found = load_file(tmp_path / "m.safetensors")
    average, live = bank["0.5"].state_dict(), model.state_dict()
    assert found.keys() == {"embed.weight", "scale", *(name for name in live if name.startswith("norm."))}
    for name in ("embed.weight", "norm.weight", "norm.bias"):
        assert same(found[name], average[name])
        assert not torch.equal(found[name], live[name])
    for name in ("scale", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert same(found[name], live[name])


def test_live_weights_are_those_of_the_model(tmp_path: Path) -> None:
    model = Tied()
    run_dir, _ = save_run(tmp_path, model)
    assert export(run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}") == 0
    found = load_file(tmp_path / "m.safetensors")
    assert all(same(tensor, model.state_dict()[name]) for name, tensor in found.items())
    assert "rule" not in metadata(tmp_path / "m.safetensors")


def test_a_tied_tensor_is_stored_once_and_the_plain_class_loads_strictly(tmp_path: Path) -> None:
    run_dir, bank = save_run(tmp_path, Tied())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 0
    assert metadata(tmp_path / "m.safetensors")["head.weight"] == "embed.weight"
    plain = Tied()
    assert load_model(plain, tmp_path / "m.safetensors") == (set(), [])
    assert plain.head.weight is plain.embed.weight
    assert same(plain.head.weight.detach(), bank["0.5"].state_dict()["head.weight"])


def test_metadata_says_where_the_weights_are_from(tmp_path: Path) -> None:
    run_dir, _ = save_run(tmp_path, Tied(width=4), width=4)
    export(run_dir, "weights=ema/0.5", f"out={tmp_path / 'm.safetensors'}")
    facts = metadata(tmp_path / "m.safetensors")
    expected = {
        "format": "pt",
        "weights": "ema/0.5",
        "rule": "constant",
        "decay": "0.5",
        "start_iter": "0",
        "updates": "4",
        "step": "4",
        "run": "run",
        "config_sha256": run_dir.meta["config_sha256"],
        "git_commit": "c0ffee",
        "git_dirty": "True",
    }
    assert expected.items() <= facts.items()
    assert json.loads(facts["model"]) == {"_target_": "tests.exports.Tied", "width": 4}
    assert json.loads(facts["rule_fields"])["update_every"] == 1


def test_wrappers_do_not_show_in_names(tmp_path: Path) -> None:
    model = Tied()
    run_dir, bank = save_run(tmp_path, model, wrapped=torch.compile(model))
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 0
    load_model(plain := Tied(), tmp_path / "m.safetensors")
    assert same(plain.norm.weight.detach(), bank["0.5"].state_dict()["norm.weight"])


def test_a_submodule_with_the_name_of_a_wrapper_keeps_it(tmp_path: Path) -> None:
    run_dir, bank = save_run(tmp_path, Wrapper())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 0
    load_model(plain := Wrapper(), tmp_path / "m.safetensors")
    assert same(plain.module.weight.detach(), bank["0.5"].state_dict()["module.weight"])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_floating_point_tensors_are_cast_and_counts_are_not(tmp_path: Path, name: str) -> None:
    run_dir, bank = save_run(tmp_path, Tied())
    export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}", f"dtype={name}")
    found = load_file(tmp_path / "m.safetensors")
    assert same(found["embed.weight"], bank["0.5"].state_dict()["embed.weight"].to(getattr(torch, name)))
    assert found["norm.running_var"].dtype is getattr(torch, name)
    assert found["norm.num_batches_tracked"].dtype is torch.int64


@pytest.mark.parametrize("size", ["5GB", "50"])
@pytest.mark.parametrize("out", ["m.safetensors", "folder/"])
def test_the_printed_python_loads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, size: str, out: str
) -> None:
    """50 bytes are less than the embedding's 60: it has a file of its own, and the rest is shared out."""
    monkeypatch.chdir(tmp_path)
    run_dir, bank = save_run(tmp_path, Tied())
    assert export(run_dir, "weights=ema", f"out={out}", f"max_shard_size={size}") == 0
    printed = capsys.readouterr().out
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in printed.split("load it with:\n")[1].splitlines()), names)
    average = bank["0.5"].state_dict()
    for name, value in names["model"].state_dict().items():
        assert same(value, average.get(name, torch.tensor(2.0))), name


def test_an_index_lists_every_tensor_in_files_of_the_size_asked_for(tmp_path: Path) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}", "max_shard_size=50")
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    sizes = {"embed.weight": 60, "norm.num_batches_tracked": 8, "scale": 4}
    sizes |= {f"norm.{name}": 12 for name in ("weight", "bias", "running_mean", "running_var")}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"].keys() == sizes.keys()
    for file in set(index["weight_map"].values()):
        names = load_file(tmp_path / file).keys()
        assert names == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(sizes[name] for name in names) <= 50 or names == {"embed.weight"}
        assert metadata(tmp_path / file)["weights"] == "ema/0.5"
    assert not (tmp_path / "m.safetensors").exists()


def test_memory_holds_the_tensors_of_one_file_and_no_copy_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, save = TensorReader.read, launch.exporting.weights.save_file
    alive: list[weakref.ref[Tensor]] = []

    def watched(reader: TensorReader, name: str) -> Tensor:
        tensor = read(reader, name)
        alive.append(weakref.ref(tensor))
        return tensor

    def counted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        held = [found for one in alive if (found := one()) is not None]
        assert len(held) == len(tensors) and all(any(a is b for b in tensors.values()) for a in held)
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(TensorReader, "read", watched)
    monkeypatch.setattr(launch.exporting.weights, "save_file", counted)
    run_dir, _ = save_run(tmp_path, Tied())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}", "max_shard_size=50") == 0
    assert len(list(tmp_path.glob("m-*.safetensors"))) > 2


def test_an_earlier_checkpoint_is_exported_by_its_step(tmp_path: Path) -> None:
    run_dir, bank = save_run(tmp_path, Tied(), steps=(2, 4))
    export(run_dir, "weights=ema", "step=2", f"out={tmp_path / 'two.safetensors'}")
    export(run_dir, "weights=ema", f"out={tmp_path / 'four.safetensors'}")
    two, four = (load_file(tmp_path / f"{name}.safetensors")["embed.weight"] for name in ("two", "four"))
    assert same(four, bank["0.5"].state_dict()["embed.weight"]) and not torch.equal(two, four)


def test_the_step_of_the_best_evaluation_is_found_by_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), steps=(2, 4))
    losses = {
        2: {"eval/ema/0.5/loss": 3.0, "eval/live/loss": 1.0},
        3: {"eval/ema/0.5/loss": 1.5},
        4: {"eval/ema/0.5/loss": 2.0},
    }
    lines = [json.dumps({"train/step": step, **record}) for step, record in losses.items()]
    run_dir.metrics_path.write_text("\n".join(lines) + "\n")
    # The last evaluation is best by the average, the best one of a kept step by the live weights.
    for weights, name, step in (("ema", "ema/0.5", "4"), ("live", "live", "2"), ("best", "live", "2")):
        out = tmp_path / f"{weights}.safetensors"
        assert export(run_dir, f"weights={weights}", "step=best", f"out={out}") == 0
        assert (metadata(out)["weights"], metadata(out)["step"]) == (name, step)
        better = "note: step=best: step 4 (loss 2, ema/0.5) is the best with a checkpoint; step 3 (loss 1.5, ema/0.5)"
        assert (better in capsys.readouterr().out) == (weights == "ema")


def test_a_class_that_cannot_be_built_on_meta_is_built_for_real(tmp_path: Path) -> None:
    run_dir, bank = save_run(tmp_path, Counting())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 0
    assert same(load_file(tmp_path / "m.safetensors")["bias"], bank["0.5"].state_dict()["bias"])


def test_what_has_live_values_and_which_statistics_are_exported_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), ema=EMAGroupConfig(batchnorm_batches=3))
    export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: 1 of 7 tensors are not averaged and have live values",
        "note: BatchNorm statistics are exported as the average keeps them, but its evaluations re-estimated them"
        " (ema.batchnorm_batches=3)",
    ]


def test_statistics_of_the_evaluations_come_before_those_that_the_average_copied() -> None:
    tensors = Tied().state_dict()
    stored = {f"{part}/{name}": tensor for part in ("model", "ema/0.5") for name, tensor in tensors.items()}
    mean = "batchnorm/0.5/norm.running_mean"
    stored |= {mean: torch.ones(3), "batchnorm/0.9/norm.running_var": torch.ones(3)}
    sources = match_names(Tied(), stored, "0.5", None, Path("step-00000004")).sources
    assert sources["norm.running_mean"].keys == [mean]
    assert sources["norm.running_var"].keys == ["ema/0.5/norm.running_var"]
    assert match_names(Tied(), stored, None, None, Path()).sources["norm.running_mean"].keys != [mean]
    with pytest.raises(ConfigError, match=r"step-00000004 has batchnorm/0\.5/other, but the model"):
        match_names(
            Tied(), stored | {"batchnorm/0.5/other": torch.ones(3)}, "0.5", None, Path("step-00000004")
        )


def test_arguments_of_a_strangers_configuration_are_printed_as_text() -> None:
    node = {"_target_": "a.B", "x": 1, "y=1); import os; (z": "') or 1", "class": [None, {"k": 1.5}]}
    lines = python_lines(node, None, Destination(Path("m.safetensors")), ["m.safetensors"], {})
    made: dict[str, Any] = {"B": dict, "load_model": lambda *_: None}
    exec(lines[1], made)
    assert made["model"] == {key: value for key, value in node.items() if key != "_target_"}

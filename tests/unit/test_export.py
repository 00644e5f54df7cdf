"""What an export holds. The expected values are the tensors of the average and of the model that the checkpoint was
saved from; `load_model` of safetensors is the judge of names and ties.
"""

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import launch.export_weights
from ema import EMABank, EMAConfig
from launch.export import main
from trainer.checkpoint import TensorReader, save_checkpoint
from trainer.compose import freeze_config
from trainer.config import Config, EMAGroupConfig
from trainer.rundir import RunDir
from trainer.training_state import training_state


class Tied(nn.Module):
    """A head that is the embedding, BatchNorm statistics, a frozen parameter and a buffer that is not saved."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.full((), 2.0), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(7), persistent=False)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight


class Counting(nn.Linear):
    """Its constructor computes with the values of tensors, as meta tensors do not allow."""

    def __init__(self, width: int = 2) -> None:
        super().__init__(width, int(torch.ones(width).sum()))


class Renaming(nn.Linear):
    """Saves its weight under another name than it has."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._register_state_dict_hook(lambda module, state, *_: state.update(kernel=state.pop("weight")))
        self.register_load_state_dict_pre_hook(
            lambda module, state, *_: state.update(weight=state.pop("kernel"))
        )


class Wrapper(nn.Module):
    """Has a submodule whose name is one that wrappers add."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def save_run(
    folder: Path,
    model: nn.Module,
    *,
    decays: tuple[float, ...] = (0.5,),
    start_iter: int = 0,
    steps: tuple[int, ...] = (4,),
    wrapped: Any = None,
    ema: EMAGroupConfig | None = None,
    **arguments: Any,
) -> tuple[RunDir, EMABank]:
    """A run directory as the trainer leaves it after some steps of random changes."""
    target = f"{type(model).__module__}.{type(model).__qualname__}"
    config = Config(model={"_target_": target, **arguments}, ema=ema or EMAGroupConfig())
    run_dir = RunDir.create(
        folder / "run",
        config_yaml=freeze_config(config),
        overrides=[],
        meta={"git": {"commit": "c0ffee", "dirty": True}},
    )
    trained = model if wrapped is None else wrapped
    configs = {repr(decay): EMAConfig(decay=decay, start_iter=start_iter) for decay in decays}
    bank = EMABank(trained, configs)
    optimizer = torch.optim.SGD(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for step in range(1, max(steps) + 1):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point() and (tensor.requires_grad or tensor.ndim):
                    tensor += torch.randn(tensor.shape, generator=generator)
        bank.update(trained, iteration=step)
        if step in steps:
            averages = {name: average.state_dict() for name, average in bank.items()}
            state = {
                **training_state(trained, optimizer),
                "ema": averages,
                "progress": {"step": step, "skipped": 0, "averages": list(bank)},
            }
            save_checkpoint(run_dir.checkpoints, step, state, keep=9)
    return run_dir, bank


def export(run_dir: RunDir, *arguments: str) -> int:
    return main([str(run_dir.path), "allow_targets=[tests.]", *arguments])


def refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    run_dir: RunDir,
    *arguments: str,
    trust: str = "tests.",
) -> str:
    """The one line of a refusal, after which nothing new lies beside the run."""
    before = sorted(tmp_path.iterdir())
    assert main([str(run_dir.path), f"allow_targets=[{trust}]", *arguments]) == 2
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


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
    assert json.loads(facts["model"]) == {"_target_": "tests.unit.test_export.Tied", "width": 4}
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
    assert same(plain.module.weight.detach(), bank["0.5"].state_dict()["weight"])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_floating_point_tensors_are_cast_and_counts_are_not(tmp_path: Path, name: str) -> None:
    run_dir, bank = save_run(tmp_path, Tied())
    export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}", f"dtype={name}")
    found = load_file(tmp_path / "m.safetensors")
    assert same(found["embed.weight"], bank["0.5"].state_dict()["embed.weight"].to(getattr(torch, name)))
    assert found["norm.running_var"].dtype is getattr(torch, name)
    assert found["norm.num_batches_tracked"].dtype is torch.int64


def test_a_value_that_float16_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Tied()
    nn.init.constant_(model.norm.bias, 1e5)
    run_dir, _ = save_run(tmp_path, model)
    line = refused(
        capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}", "dtype=float16"
    )
    assert line.startswith("error: dtype: norm.bias holds 1e+05, more than float16 can")


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
    read, save = TensorReader.read, launch.export_weights.save_file
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
    monkeypatch.setattr(launch.export_weights, "save_file", counted)
    run_dir, _ = save_run(tmp_path, Tied())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}", "max_shard_size=50") == 0
    assert len(list(tmp_path.glob("m-*.safetensors"))) > 2


def test_an_earlier_checkpoint_is_exported_by_its_step(tmp_path: Path) -> None:
    run_dir, bank = save_run(tmp_path, Tied(), steps=(2, 4))
    export(run_dir, "weights=ema", "step=2", f"out={tmp_path / 'two.safetensors'}")
    export(run_dir, "weights=ema", f"out={tmp_path / 'four.safetensors'}")
    two, four = (load_file(tmp_path / f"{name}.safetensors")["embed.weight"] for name in ("two", "four"))
    assert same(four, bank["0.5"].state_dict()["embed.weight"]) and not torch.equal(two, four)


def test_a_class_that_cannot_be_built_on_meta_is_built_for_real(tmp_path: Path) -> None:
    run_dir, bank = save_run(tmp_path, Counting())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 0
    assert same(load_file(tmp_path / "m.safetensors")["bias"], bank["0.5"].state_dict()["bias"])


def test_an_average_that_has_not_started_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), start_iter=100)
    line = refused(capsys, tmp_path, run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    assert line.startswith("error: weights: ema/0.5 had not started at step 4 (ema.start_iter=100)")


def test_names_paths_and_targets_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), decays=(0.5, 0.9))
    out = f"out={tmp_path / 'm.safetensors'}"
    (tmp_path / "taken").mkdir()
    known = "error: weights: expected one of live, ema/0.5, ema/0.9, got "
    for weights in ("ema", "ema/../../model", "ema/0.5/", "/etc/passwd"):
        assert refused(capsys, tmp_path, run_dir, f"weights={weights}", out) == known + weights
    assert refused(capsys, tmp_path, run_dir, out) == f"{known}nothing"
    line = refused(capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'taken'}")
    assert line == f"error: out: {tmp_path / 'taken'} exists already; nothing is overwritten"
    line = refused(capsys, tmp_path, run_dir, "weights=live", "step=3", out)
    assert line.startswith("error: step: ")
    line = refused(capsys, tmp_path, run_dir, "weights=live", out, trust="elsewhere.")
    assert line.startswith("error: model._target_: 'tests.unit.test_export.Tied' is not under ")
    assert line.endswith("add allow_targets=[tests.]")


def test_a_file_of_several_that_exists_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    (tmp_path / "m-00002-of-00007.safetensors").touch()
    out = f"out={tmp_path / 'm.safetensors'}"
    line = refused(capsys, tmp_path, run_dir, "weights=ema", out, "max_shard_size=1")
    assert line.endswith("m-00002-of-00007.safetensors exists already; nothing is overwritten")


def test_a_damaged_checkpoint_is_named_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    (shard,) = run_dir.checkpoints.glob("step-*/*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = refused(capsys, tmp_path, run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    assert line.startswith(f"error: {shard} is damaged (its checksum is not the marker's)")


def test_weights_that_the_run_untied_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Tied()
    model.head.weight = nn.Parameter(torch.zeros(5, 3))
    run_dir, _ = save_run(tmp_path, model)
    line = refused(capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}")
    assert line.startswith(
        "error: model: model/embed.weight and model/head.weight are one tensor in the class"
    )


def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(width=3), width=4)
    line = refused(capsys, tmp_path, run_dir, "weights=live", f"out={tmp_path / 'm.safetensors'}")
    assert line.endswith("model/embed.weight has shape (5, 3), and Tied has (5, 4)")


def test_an_average_under_other_names_than_the_saved_ones_is_not_replaced_by_live_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Renaming())
    line = refused(capsys, tmp_path, run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    assert line.endswith("ema/0.5/weight has no place in the model that config.yaml describes")


def test_what_has_live_values_and_which_statistics_are_exported_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), ema=EMAGroupConfig(batchnorm_batches=3))
    export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: 1 of 7 tensors are not averaged and have live values",
        "note: BatchNorm statistics are as the average keeps them; its evaluations re-estimated them"
        " (ema.batchnorm_batches=3)",
    ]


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.export_weights, "save_file", interrupted)
    run_dir, _ = save_run(tmp_path, Tied())
    assert export(run_dir, "weights=ema", f"out={tmp_path / 'm.safetensors'}") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    code = (
        "import os, runpy, signal, sys, safetensors.torch\n"
        "def stopped(tensors, path, metadata):\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGTERM)\n"
        "safetensors.torch.save_file = stopped\n"
        f"sys.argv = ['', {str(run_dir.path)!r}, 'weights=ema', 'out=m.safetensors', 'allow_targets=[tests.]']\n"
        "runpy.run_module('launch.export', run_name='__main__')\n"
    )
    tree = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": tree},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_arguments_of_a_strangers_configuration_are_printed_as_text() -> None:
    node = {"_target_": "a.B", "x": 1, "y=1); import os; (z": "') or 1", "class": [None, {"k": 1.5}]}
    from launch.export_files import Destination
    from launch.export_loading import python_lines

    lines = python_lines(node, None, Destination(Path("m.safetensors")), ["m.safetensors"], {})
    made: dict[str, Any] = {"B": dict, "load_model": lambda *_: None}
    exec(lines[1], made)
    assert made["model"] == {key: value for key, value in node.items() if key != "_target_"}

"""`conf/model`: every file builds, lists every argument, and explains every line."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from trainer.config.facts import SIZES

FOLDER = Path(__file__).parents[2] / "conf" / "model"
FILES = sorted(FOLDER.glob("*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
built_files = pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in ("custom", "lora")], ids=lambda path: path.stem
)


def target_and_arguments(path: Path) -> tuple[type[nn.Module], dict[str, Any]]:
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    module, _, name = config.pop("_target_").rpartition(".")
    return getattr(import_module(module), name), config


def on_meta(name: str) -> nn.Module:
    target, arguments = target_and_arguments(FOLDER / f"{name}.yaml")
    arguments |= {size: 256 for size in SIZES if size in arguments and arguments[size] is None}
    with torch.device("meta"):
        return target(**arguments)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_choices_are_those_documented() -> None:
    names = {"byol", "custom", "dit", "dit_b", "gpt", "gpt2_124m", "gpt_7b", "lora", "mlp", "resnet"}
    assert {path.stem for path in FILES} == names


@built_files
def test_a_file_lists_exactly_the_arguments_of_its_class(path: Path) -> None:
    """All of them: Hydra then knows every key and refuses the misspelt ones."""
    target, arguments = target_and_arguments(path)
    parameters = inspect.signature(target).parameters
    assert list(arguments) == list(parameters)
    for name, value in arguments.items():
        kind = parameters[name].annotation
        if name in SIZES and value is None:  # the data gives it
            value = 256
        assert type(value) is kind or (kind == list[int] and all(type(entry) is int for entry in value)), name


@built_files
def test_a_file_builds_on_meta(path: Path) -> None:
    model = on_meta(path.stem)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@every_file
def test_every_line_is_commented(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    bare = [line for line in lines if "#" not in line and not line.startswith("_target_:")]
    assert bare == []


def test_lora_has_arguments_of_peft_with_its_defaults() -> None:
    """All but the rank's scale, which peft leaves at the same number for every rank."""
    peft = pytest.importorskip("peft", reason="the extra is not installed")
    config = OmegaConf.to_container(OmegaConf.load(FOLDER / "lora.yaml"))
    assert isinstance(config, dict)
    assert list(config) == ["_target_", *list(inspect.signature(peft.get_peft_model).parameters)[:2]]
    defaults = peft.LoraConfig()
    given = {name: value for name, value in config["peft_config"].items() if name[0] != "_"}
    assert given == {**{name: getattr(defaults, name) for name in given}, "lora_alpha": 16}


def test_custom_names_no_class_of_its_own() -> None:
    config = OmegaConf.load(FOLDER / "custom.yaml")
    assert list(config) == ["_target_"]
    assert OmegaConf.is_missing(config, "_target_")


def test_gpt2_124m_has_the_parameters_of_gpt2_without_positions_and_biases() -> None:
    """12 n_layer n_embd^2 + vocab n_embd in matrices, (2 n_layer + 1) n_embd in norms: 123.6 M."""
    assert count(on_meta("gpt2_124m")) == 12 * 12 * 768**2 + 50304 * 768 + 25 * 768 == 123_587_328


def test_dit_b_has_130_million_parameters() -> None:
    """DiT-B/2 takes 23.01 GFLOPs of one multiply-add each (the paper's table 4); here 2 each, and 3 forwards."""
    model = on_meta("dit_b")
    assert 129e6 < count(model) < 132e6
    assert model.flops_per_sample() == pytest.approx(3 * 2 * 23.01e9, rel=0.01)


def test_the_quickstart_model_is_small() -> None:
    assert count(on_meta("gpt")) < 1_000_000

"""The printed lines load a subclass of a model of transformers, whatever its constructor takes."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model

from launch.exporting.files import Destination
from launch.exporting.loading import python_lines, write_config
from tests.makers import Deferred

transformers = Deferred("transformers")

MODULE = """
from transformers import GPT2Config, GPT2LMHeadModel

class Configured(GPT2LMHeadModel):
    pass

class Wide(GPT2LMHeadModel):
    def __init__(self, width=8):
        super().__init__(GPT2Config(n_layer=1, n_embd=width, n_head=2, vocab_size=16, n_positions=8))
"""
SIZE = {"n_layer": 1, "n_embd": 4, "n_head": 2, "vocab_size": 16, "n_positions": 8}


@pytest.mark.parametrize("name", ["Configured", "Wide"])
def test_the_printed_lines_load_a_subclass(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_gpt_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_gpt_of_a_test")
    node: dict[str, Any] = {"_target_": f"my_gpt_of_a_test.{name}", "width": 4}
    if name == "Configured":
        node = {"_target_": node["_target_"], "config": {"_target_": "transformers.GPT2Config", **SIZE}}
        model = module.Configured(transformers.GPT2Config(**SIZE))
    else:
        model = module.Wide(width=4)
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, str(out / "model.safetensors"), metadata={"format": "pt"})
    write_config(model, "transformers", out, "float32")
    loaded: dict[str, Any] = {}
    exec("\n".join(python_lines(node, model, Destination(out), ["model.safetensors"], {})), loaded)
    assert type(loaded["model"]) is type(model)
    assert all(map(torch.equal, loaded["model"].state_dict().values(), model.state_dict().values()))

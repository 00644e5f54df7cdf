"""Models of peft: what their averages hold, and what an export of the adapters or of the merged model computes.

The reference is the model of the run with the average swapped in. peft itself loads what was exported.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from launch.export import main
from tests.exports import Tied, save_run
from tests.makers import Deferred
from trainer.config.targets import instantiate
from trainer.rundir.directory import RunDir

peft, transformers = Deferred("peft"), Deferred("transformers")

GPT2 = {
    "_target_": "transformers.GPT2LMHeadModel",
    "config": {
        "_target_": "transformers.GPT2Config",
        **{"vocab_size": 50, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 8},
        **{"bos_token_id": 0, "eos_token_id": 0},
    },
}
"""A tiny model whose head is its embedding."""
TOKENS = torch.arange(16).view(2, 8)


def lora(base: dict[str, Any], **fields: Any) -> dict[str, Any]:
    config = {"_target_": "peft.LoraConfig", "r": 2, **fields}
    return {"_target_": "peft.get_peft_model", "model": base, "peft_config": config}


def run_of(
    folder: Path, node: dict[str, Any], allowed: tuple[str, ...] = ()
) -> tuple[RunDir, nn.Module, EMABank]:
    torch.manual_seed(0)
    model = instantiate(node, group="model", allowed=allowed)
    run_dir, bank = save_run(folder, model, node=node)
    return run_dir, model.eval(), bank


@torch.no_grad()
def averaged(model: nn.Module, bank: EMABank) -> Tensor:
    live = model(TOKENS).logits
    with bank["0.5"].swapped_into(model):
        result: Tensor = model(TOKENS).logits
    assert (live - result).abs().max() > 1e-3
    return result


def exported(run_dir: RunDir, out: Path, *arguments: str) -> Path:
    assert main([str(run_dir.path), "weights=ema", f"out={out}/", *arguments]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], run_dir: RunDir, out: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main([str(run_dir.path), "weights=ema", f"out={out}/", *arguments]) == 2
    assert not out.exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_an_average_holds_the_adapters_alone() -> None:
    model: Any = instantiate(lora(GPT2, target_modules=["c_attn"]), group="model", allowed=())
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < sum(trained.values()) < sum(p.numel() for p in model.parameters()) / 5
    state = EMABank(model, {"a": EMAConfig(decay=0.5)})["a"].state_dict()
    assert {name: tensor.numel() for name, tensor in state.items() if "_ema." not in name} == trained


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": "all-linear", "modules_to_save": ["ln_f"], "use_rslora": True},
        {"target_modules": ["c_attn"], "bias": "all", "task_type": "CAUSAL_LM"},
        {"target_modules": ["c_attn", "wte"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]},
    ],
    ids=["plain", "norm", "bias", "embedding", "head", "tokens"],
)
def test_peft_loads_the_adapters_and_transformers_the_merged_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    """Where an adapter changes the embedding or the head of this tied model, the other must not change with it."""
    run_dir, model, bank = run_of(tmp_path, lora(GPT2, **fields))
    expected = averaged(model, bank)

    folder = exported(run_dir, tmp_path / "adapters")
    assert "PeftModel.from_pretrained(GPT2LMHeadModel(config=GPT2Config(" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    torch.manual_seed(0)
    base = instantiate(GPT2, group="model", allowed=())
    # The run changed the frozen weights too, as no training does.
    base.load_state_dict(original(model))
    loaded = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-4)

    folder = exported(run_dir, tmp_path / "merged", "merged=true")
    whole = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(TOKENS).logits, expected, rtol=1e-5, atol=1e-4)


def original(model: Any) -> dict[str, Tensor]:
    """The tensors of the base model within a model of peft, by the names that they have without it."""
    added = ("lora_", "modules_to_save", "trainable_tokens")
    state = model.get_base_model().state_dict()
    return {
        re.sub(r"token_adapter\.|base_layer\.|original_module\.", "", name): tensor
        for name, tensor in state.items()
        if not any(part in name for part in added)
    }


def test_adapters_that_do_not_fit_the_original_base_are_refused_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = lora(GPT2, target_modules=["c_attn"], init_lora_weights="pissa")
    run_dir, model, bank = run_of(tmp_path, node)
    line = refused(capsys, run_dir, tmp_path / "adapters")
    assert (
        line.startswith("merged: init_lora_weights=pissa has changed the base model")
        and "merged=true" in line
    )
    folder = exported(run_dir, tmp_path / "merged", "merged=true")
    whole = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(TOKENS).logits, averaged(model, bank), rtol=1e-5, atol=1e-4)


def test_a_plain_class_gets_adapters_and_a_tie_that_it_cannot_undo_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = "allow_targets=[tests.]"
    node = lora({"_target_": "tests.exports.Tied"}, target_modules=["head"])
    run_dir, _, bank = run_of(tmp_path, node, ("tests.",))
    folder = exported(run_dir, tmp_path / "adapters", trust)
    assert "do not contain the BatchNorm statistics" in capsys.readouterr().out
    average = bank["0.5"].state_dict()
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == {f"base_model.model.head.lora_{part}.weight" for part in "AB"}
    for name, tensor in found.items():
        assert torch.equal(tensor, average[name.replace(".weight", ".default.weight")])
    peft.PeftModel.from_pretrained(Tied(), str(folder))
    line = refused(capsys, run_dir, tmp_path / "merged", trust, "merged=true")
    assert line.startswith("merged: Tied ties ")


def opened(width: int = 8) -> nn.Module:
    """A model of peft in which a frozen module is trained again, and which no `model` of a configuration builds."""
    model: nn.Module = instantiate(lora(GPT2, target_modules=["c_attn"]), group="model", allowed=())
    return model.requires_grad_(True)


def test_what_an_adapter_folder_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = f"{__name__}.opened"
    run_dir, model, bank = run_of(tmp_path, {"_target_": make}, (make,))
    trust = f"allow_targets=[{make}]"
    line = refused(capsys, run_dir, tmp_path / "adapters", trust)
    assert line.startswith("merged: an adapter folder of peft cannot hold base_model.model.transformer.h.0.")
    folder = exported(run_dir, tmp_path / "merged", trust, "merged=true")
    whole = transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(TOKENS).logits, averaged(model, bank), rtol=1e-5, atol=1e-4)


def test_prompts_are_exported_to_a_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"_target_": "peft.PromptTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    node = {"_target_": "peft.get_peft_model", "model": GPT2, "peft_config": config}
    run_dir, _, bank = run_of(tmp_path, node)
    line = refused(capsys, run_dir, tmp_path / "adapters")
    assert line.startswith("merged: an adapter folder of PROMPT_TUNING holds prompts")
    assert main([str(run_dir.path), "weights=ema", f"out={tmp_path}/m.safetensors"]) == 0
    name = "prompt_encoder.default.embedding.weight"
    assert torch.equal(load_file(tmp_path / "m.safetensors")[name], bank["0.5"].state_dict()[name])


def test_the_path_of_the_base_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, peft would look for a relative one in the network."""
    monkeypatch.chdir(tmp_path)
    instantiate(GPT2, group="model", allowed=()).save_pretrained("base")
    load = "transformers.GPT2LMHeadModel.from_pretrained"
    node = lora({"_target_": load, "pretrained_model_name_or_path": "base"}, target_modules=["c_attn"])
    run_dir, _, _ = run_of(tmp_path, node, (load,))
    folder = exported(run_dir, tmp_path / "adapters", f"allow_targets=[{load}]")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["inference_mode"] is True


def test_merged_needs_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = save_run(tmp_path, Tied())
    trust = "allow_targets=[tests.]"
    line = refused(capsys, run_dir, tmp_path / "merged", trust, "merged=true")
    assert line == "merged: expected a model of peft, the run has a Tied"
    line = refused(capsys, run_dir, tmp_path / "merged", trust, "merged=yes")
    assert line == "merged: expected true or false, got yes"

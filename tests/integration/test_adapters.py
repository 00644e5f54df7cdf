"""A model of a local folder, fine-tuned and with adapters of peft, through overrides alone; its average is exported.

The reference is the loss that the run itself recorded for the average at its last step.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from launch.export import main
from tests.integration.commands import Warm, last, saved
from tests.makers import Deferred
from trainer.build import EVALUATION_SEED
from trainer.data.batches import eval_batches
from trainer.data.python_docs import python_docs
from trainer.tasks.language_modeling import LanguageModeling

peft, transformers = Deferred("peft"), Deferred("transformers")

LOAD = "transformers.AutoModelForCausalLM.from_pretrained"
TRUST = f"allow_targets=[{LOAD}]"
LOSSES = ("eval/live/loss", "eval/ema/0.5/loss")
SHORT = (
    "data.context=16",
    "data.max_bytes=200000",
    "trainer.steps=6",
    "trainer.global_batch_size=8",
    "trainer.eval_samples=16",
    "trainer.eval_batch_size=4",
    "trainer.num_threads=1",
    "trainer.log_every=1",
    "ema=constant",
    "ema.decay=0.5",
    "optimizer.lr=0.03",
    "logger=none",
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder `base` of the working directory, as `save_pretrained` writes it, of a tiny Llama."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=16, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("base")


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """Mean loss on the evaluation samples of the run."""
    splits, task = python_docs(context=16, max_bytes=200000), LanguageModeling()
    (losses,) = [
        task.losses(model.eval(), batch, None)
        for batch, _, _ in eval_batches(splits.eval, 16, 16, 0, 1, EVALUATION_SEED)
    ]
    return float(losses.mean())


def from_folder(folder: str) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model


def average_of(run: str) -> float:
    """The recorded loss of the average, which neither the live weights nor the base model have."""
    live, average = last(Path(run), LOSSES)
    assert abs(live - average) > 1e-3 and abs(loss_of(from_folder("base")) - average) > 1e-3
    return average


def test_a_model_of_a_folder_is_fine_tuned_and_its_average_loads_from_a_folder(
    tmp_path: Path, base: None, warm: Warm
) -> None:
    model = ("model=custom", f"model._target_={LOAD}", "+model.pretrained_model_name_or_path=base")
    warm(*SHORT, *model, "run_dir=run", cwd=tmp_path)
    assert main(["run", "weights=ema", "out=tuned/", TRUST]) == 0
    assert loss_of(from_folder("tuned/")) == pytest.approx(average_of("run"), abs=1e-5)


def test_adapters_train_sharded_as_in_one_process_and_their_average_loads_from_a_folder(
    tmp_path: Path, base: None, warm: Warm
) -> None:
    model = (
        "model=lora",
        f"model.model._target_={LOAD}",
        "+model.model.pretrained_model_name_or_path=base",
        "model.peft_config.r=4",
        "model.peft_config.target_modules=[q_proj,down_proj]",
        "model.peft_config.modules_to_save=[norm]",
    )
    warm(*SHORT, *model, "run_dir=one", cwd=tmp_path)
    warm(*SHORT, *model, "run_dir=two", "sharding=fsdp", cwd=tmp_path, ranks=2)
    assert last(Path("two"), LOSSES) == pytest.approx(last(Path("one"), LOSSES), abs=1e-5)
    (one, _), (two, _) = saved(Path("one")), saved(Path("two"))
    frozen = from_folder("base").state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    for name, tensor in frozen.items():
        kept = [two[key] for key in two if key in (f"model/base_model.model.{name}", based(name))]
        assert [torch.equal(one, tensor) for one in kept] == [True], name
    averaged = {name for name in two if name.startswith("ema/0.5/base_model.")}
    # Two matrices for each of two modules in two blocks, and five norms, whose names all end so.
    assert len(averaged) == 2 * 2 * 2 + 5 and all("lora_" in name or "norm." in name for name in averaged)
    assert {name.split("/")[2] for name in two if name.startswith("optimizer/state/")} == {
        name.removeprefix("ema/0.5/") for name in averaged
    }

    assert main(["two", "weights=ema", "out=adapters/", TRUST]) == 0
    loaded = peft.PeftModel.from_pretrained(from_folder("base"), "adapters")
    assert loss_of(loaded) == pytest.approx(average_of("two"), abs=1e-5)
    assert main(["two", "weights=ema", "out=merged/", "merged=true", TRUST]) == 0
    assert loss_of(from_folder("merged/")) == pytest.approx(average_of("two"), abs=1e-5)


def based(name: str) -> str:
    """The key of a tensor of the base model that has an adapter or a trained copy beside it."""
    module, _, kind = name.rpartition(".")
    part = "original_module" if module.endswith("norm") else "base_layer"
    return f"model/base_model.model.{module}.{part}.{kind}"

"""Models of transformers and diffusers, trained and fine-tuned through overrides alone, also with adapters of peft.

They are exported for `from_pretrained`. What an export must compute is computed here with the average swapped into the
model that the checkpoint is loaded into, or is the loss that the run itself recorded for the average at its last step.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ema import EMABank, EMAConfig
from launch.export import main
from tests.integration.commands import TIMEOUT_S, Warm, last, records, saved
from tests.makers import TINY_GPT, Deferred
from trainer.build import EVALUATION_SEED
from trainer.checkpoint.store import newest_checkpoint
from trainer.checkpoint.training_state import load_training_state
from trainer.data.batches import eval_batches
from trainer.data.python_docs import python_docs
from trainer.tasks.language_modeling import LanguageModeling

peft, transformers = Deferred("peft"), Deferred("transformers")

TOLERANCE = 1e-6
"""Two processes lay the same weights out at other addresses, and a kernel may sum in another order."""
SHORT = ("trainer.steps=6", "trainer.log_every=1", "ema.decay=0.5", "sharding=fsdp", "run_dir=run")


def test_a_transformers_causal_lm_under_fsdp(tmp_path: Path, warm: Warm) -> None:
    overrides = [override for override in TINY_GPT if not override.startswith("model.")]
    warm(
        *overrides,
        "model=custom",
        "model._target_=transformers.GPT2LMHeadModel",
        "+model.config._target_=transformers.GPT2Config",
        "+model.config.vocab_size=256",
        "+model.config.n_positions=32",
        "+model.config.n_layer=2",
        "+model.config.n_head=2",
        "+model.config.n_embd=32",
        *SHORT,
        cwd=tmp_path,
        ranks=2,
    )
    check(tmp_path / "run")

    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 256, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    tokens = torch.arange(64).view(2, 32)
    expected = from_average(
        GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path / "run", lambda model: model(tokens).logits
    )
    assert (
        main([str(tmp_path / "run"), "weights=ema", f"out={tmp_path / 'gpt2'}/", "max_shard_size=100KB"]) == 0
    )
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names(
        tmp_path / "gpt2"
    )
    found = in_a_process_without_this_project(
        tmp_path,
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('gpt2/').eval()\n"
        "assert model.lm_head.weight is model.transformer.wte.weight\n"
        "result = model(torch.arange(64).view(2, 32)).logits\n",
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_diffusers_unet_under_fsdp(tmp_path: Path, warm: Warm) -> None:
    pytest.importorskip("diffusers", reason="the test extra is not installed")
    warm(
        "experiment=digits_flow",
        "task.class_conditional=false",
        "task.sample_count=4",
        "task.sample_steps=2",
        "model=custom",
        "model._target_=diffusers.UNet2DModel",
        "+model.sample_size=8",
        "+model.in_channels=1",
        "+model.out_channels=1",
        "+model.layers_per_block=1",
        "+model.block_out_channels=[8,16]",
        "+model.down_block_types=[DownBlock2D,DownBlock2D]",
        "+model.up_block_types=[UpBlock2D,UpBlock2D]",
        "+model.norm_num_groups=4",
        "ema=constant",
        "trainer.global_batch_size=8",
        "trainer.eval_samples=16",
        "trainer.num_threads=1",
        "+optimizer.args.foreach=true",
        "logger=none",
        *SHORT,
        cwd=tmp_path,
        ranks=2,
        report=True,
    )
    check(tmp_path / "run")
    assert (tmp_path / "run" / "report" / "samples.png").stat().st_size > 0

    from diffusers import UNet2DModel

    images = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    made = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    expected = from_average(made, tmp_path / "run", lambda model: model(images, 3).sample)
    assert main([str(tmp_path / "run"), "weights=ema/0.5", f"out={tmp_path / 'unet'}"]) == 0
    assert names(tmp_path / "unet") == {"config.json", "diffusion_pytorch_model.safetensors"}
    found = in_a_process_without_this_project(
        tmp_path,
        "from diffusers import UNet2DModel\n"
        "model = UNet2DModel.from_pretrained('unet').eval()\n"
        "result = model(torch.linspace(-1, 1, 64).view(1, 1, 8, 8), 3).sample\n",
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def check(run_dir: Path) -> None:
    losses = [record["train/loss"] for record in records(run_dir)]
    assert losses[-1] < losses[0]
    live, average = last(run_dir, ["eval/live/loss", "eval/ema/0.5/loss"])
    assert live != average
    assert last(run_dir, ["ema/0.5/rel_l2"])[0] > 0


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@torch.no_grad()
def from_average(model: nn.Module, run_dir: Path, compute: Callable[[nn.Module], Tensor]) -> Tensor:
    """What a model computes with the average `0.5` of a run swapped in; with the live weights it is something else."""
    bank = EMABank(model, {"0.5": EMAConfig(decay=0.5, batch_size=8)})
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    optimizer = torch.optim.AdamW(model.parameters())
    averages = {"ema": {"0.5": bank["0.5"].state_dict()}}
    loaded = load_training_state(checkpoint, model, optimizer, averages)
    bank["0.5"].load_state_dict(loaded["ema"]["0.5"])
    model.eval()
    live = compute(model)
    with bank["0.5"].swapped_into(model):
        averaged = compute(model)
    assert (live - averaged).abs().max() > 100 * TOLERANCE
    return averaged


def in_a_process_without_this_project(folder: Path, code: str) -> Tensor:
    """What Python code leaves in `result`, run where none of our packages can be or was imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch\ntorch.set_num_threads(1)\n"
            f"with torch.no_grad():\n{textwrap.indent(code, '    ')}"
            "torch.save(result, 'result.pt')\n"
            "assert not {'conf', 'ema', 'launch', 'models', 'trainer', 'tests'} & set(sys.modules)\n",
        ],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: Tensor = torch.load(folder / "result.pt")
    return result


LOAD = "transformers.AutoModelForCausalLM.from_pretrained"
TRUST = f"allow_targets=[{LOAD}]"
LOSSES = ("eval/live/loss", "eval/ema/0.5/loss")
FINE_TUNED = (
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
    warm(*FINE_TUNED, *model, "run_dir=run", cwd=tmp_path)
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
    warm(*FINE_TUNED, *model, "run_dir=one", cwd=tmp_path)
    warm(*FINE_TUNED, *model, "run_dir=two", "sharding=fsdp", cwd=tmp_path, ranks=2)
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


def test_a_transformers_folder_is_fine_tuned_by_its_factory_or_as_init_from(
    tmp_path: Path, warm: Warm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 256, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    torch.manual_seed(5)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "hf")
    own = [override for override in TINY_GPT if not override.startswith("model.")]
    still = (*own, "ema.decay=0.5", "trainer.steps=2", "trainer.eval_every=1", "optimizer.lr=0")
    factory = "transformers.AutoModelForCausalLM.from_pretrained"
    by_factory = (f"model._target_={factory}", "+model.pretrained_model_name_or_path=hf")
    by_class = [
        "model._target_=transformers.GPT2LMHeadModel",
        "+model.config._target_=transformers.GPT2Config",
        *(f"+model.config.{name}={value}" for name, value in sizes.items()),
        "init_from=hf",
    ]
    found = []
    for number, model in enumerate((by_factory, by_class)):
        for ranks, sharding in ((1, ()), (2, ("sharding=fsdp",))):
            run = f"run{number}{ranks}"
            warm(*still, "model=custom", *model, *sharding, f"run_dir={run}", cwd=tmp_path, ranks=ranks)
            found.append(records(tmp_path / run)[0]["eval/live/loss"])
    assert found == pytest.approx([found[0]] * 4, abs=TOLERANCE, rel=0)

    monkeypatch.chdir(tmp_path)
    assert main(["run02", "weights=ema", "out=out/", f"allow_targets=[{factory}]"]) == 0
    names: dict[str, object] = {}
    lines = capsys.readouterr().out.split("load it with:\n")[1].splitlines()
    assert lines[0].strip() == "from transformers import GPT2LMHeadModel"
    exec("\n".join(map(str.strip, lines)), names)
    whole = transformers.GPT2LMHeadModel.from_pretrained("hf").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in names["model"].state_dict().items())
    assert main(["run02", "weights=ema", "out=w.safetensors", f"allow_targets=[{factory}]"]) == 0
    printed = capsys.readouterr().out
    assert (
        "from transformers import AutoModelForCausalLM; from safetensors.torch import load_model" in printed
    )
    assert "model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path='hf')" in printed

"""Weights of a source in a model of one process: the kinds of sources, names that differ, and what is refused."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from tests.makers import Tied, make_run_dir, network, refusal_of, save_checkpoint
from trainer.config.schema import InitConfig
from trainer.weights.load import start_from


class Executes:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def state(seed: int = 1) -> dict[str, Tensor]:
    model = network(seed)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_loaded(source: Path | str, expected: dict[str, Tensor], **init: object) -> nn.Module:
    model = network(0)
    start_from(str(source), InitConfig(**init), model)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    return model


def split_in_two(folder: Path, suffix: str, save: Callable[[dict[str, Tensor], Path], object]) -> Path:
    """Save the state in two files with an index, as transformers does."""
    folder.mkdir()
    whole = state()
    names = [f"{part}{suffix}" for part in ("model-00001-of-00002", "model-00002-of-00002")]
    places = {name: names[place % 2] for place, name in enumerate(whole)}
    for file in names:
        save({name: value for name, value in whole.items() if places[name] == file}, folder / file)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_every_kind_of_file_and_folder_loads(tmp_path: Path) -> None:
    whole = state()
    save_file(whole, tmp_path / "a.safetensors")
    torch.save(whole, tmp_path / "a.pt")
    torch.save(whole, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": whole, "optimizer": {"state": {}}}, tmp_path / "nested.pt")
    torch.save({"model": state(2), "ema": whole}, tmp_path / "two:of@3.pt")
    for folder, file in (("hf", "model"), ("diffusers", "diffusion_pytorch_model")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        save_file(whole, tmp_path / folder / f"{file}.safetensors")
    (tmp_path / "bin").mkdir()
    torch.save(whole, tmp_path / "bin" / "pytorch_model.bin")
    split_in_two(tmp_path / "sharded", ".safetensors", save_file)
    split_in_two(tmp_path / "sharded_bin", ".bin", torch.save)
    names = "a.safetensors a.pt old.pth nested.pt two:of@3.pt:ema hf diffusers bin sharded sharded_bin"
    for name in (*names.split(), "sharded/model.safetensors.index.json"):
        assert_loaded(tmp_path / name, whole)


def test_a_source_of_a_run_means_its_live_weights_and_an_average_has_live_values_of_the_rest(
    tmp_path: Path,
) -> None:
    run_dir = make_run_dir(tmp_path / "run")
    live, averaged = state(2), state(3)
    from ema import EMABank, EMAConfig

    model = network(0)
    model.load_state_dict(live)
    bank = EMABank(model, {"0.5": EMAConfig(decay=0.5), "late": EMAConfig(decay=0.5, start_iter=9)})
    bank.update(model, iteration=0)
    shadow = bank["0.5"].state_dict()
    for name, value in shadow.items():
        if name in averaged and name.endswith(("weight", "bias")):
            value.copy_(averaged[name])
    saved = {
        "model": live,
        "ema": {name: average.state_dict() for name, average in bank.items()},
        "progress": {"step": 4, "samples": 4, "skipped": 0, "lr": 0.0, "averages": list(bank)},
    }
    save_checkpoint(run_dir.checkpoints, 4, saved, keep=1)
    path = tmp_path / "run"
    for text in (f"{path}", f"{path}:live", f"{path}@4", f"{path}:live@last"):
        assert_loaded(text, live)
    parameters = {name for name, _ in network().named_parameters()}
    expected = {name: (averaged if name in parameters else live)[name] for name in live}
    for text in (f"{path}:ema/0.5", f"{path}:ema/0.5@4"):
        assert_loaded(text, expected)
    assert "ema/late had not started at step 4" in refusal_of(assert_loaded, f"{path}:ema/late", {})
    assert "checkpoints exist for step 4" in refusal_of(assert_loaded, f"{path}@5", {})
    assert "expected one of live, ema/0.5, ema/late" in refusal_of(assert_loaded, f"{path}:ema/0.7", {})


def test_provenance_has_the_digest_of_every_file(tmp_path: Path) -> None:
    import hashlib

    folder = split_in_two(tmp_path / "sharded", ".safetensors", save_file)
    facts = start_from(str(folder), InitConfig(), network(0)).facts
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safe*s"))
    }
    assert facts == {
        "source": str(folder), "path": str(folder), "kind": "safetensors", "sha256": expected
    }  # fmt: skip
    json.dumps(facts)


def test_names_are_renamed_in_order_and_wrappers_do_not_count(tmp_path: Path) -> None:
    whole = state()
    save_file(
        {f"module._orig_mod.{name}": value for name, value in whole.items()}, tmp_path / "w.safetensors"
    )
    assert_loaded(tmp_path / "w.safetensors", whole)
    renamed = {f"net.layer{name}": value for name, value in whole.items()}
    save_file(renamed, tmp_path / "r.safetensors")
    for rename in (["^net\\. -> ", "layer(\\d) -> \\1"], {"^net\\.": None, "layer(\\d)": "\\1"}):
        assert_loaded(tmp_path / "r.safetensors", whole, rename=rename)
    message = refusal_of(assert_loaded, tmp_path / "r.safetensors", {}, rename=["^net\\. -> "])
    assert "has no 0.weight and 8 more; the source has net.layer0.bias (renamed layer0.bias)" in message
    assert "init.rename" in message
    both = refusal_of(assert_loaded, tmp_path / "r.safetensors", {}, rename=["layer. -> layer"])
    assert both.startswith("init.rename: net.layer0.") and "both become" in both
    assert "init.rename: 'layer'" in refusal_of(
        assert_loaded, tmp_path / "r.safetensors", {}, rename=["layer -> \\7"]
    )


def test_an_adapter_folder_of_peft_loads_into_the_names_of_a_peft_model(tmp_path: Path) -> None:
    """The file lacks the name of the adapter, which the model has: `lora_A.weight` is `lora_A.default.weight`."""
    model = nn.Module()
    model.base = nn.Linear(3, 3)
    for name in ("lora_A", "lora_B"):
        model.register_module(name, nn.ModuleDict({"default": nn.Linear(3, 3, bias=False)}))
    save_file(
        {f"{name}.weight": torch.full((3, 3), 5.0) for name in ("lora_A", "lora_B")},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    start_from(str(tmp_path), InitConfig(missing=["base.*"]), model)
    for name in ("lora_A", "lora_B"):
        assert torch.equal(model.get_parameter(f"{name}.default.weight"), torch.full((3, 3), 5.0))


def test_missing_and_unexpected_names_are_refused_unless_a_pattern_allows_them(tmp_path: Path) -> None:
    whole, path = state(), tmp_path / "a.safetensors"
    head = {name: value for name, value in whole.items() if name.startswith("2.")}
    body = {name: value for name, value in whole.items() if name not in head}
    save_file({**body, "old_head.weight": torch.ones(3), "old_head.bias": torch.ones(3)}, path)
    missing = refusal_of(assert_loaded, path, {}, unexpected=["old_head.*"])
    assert missing == (
        "init_from: the source has no 2.weight and 1 more; keep initial weights by init.missing=[PATTERN]"
    )
    unexpected = refusal_of(assert_loaded, path, {}, missing=["2.*"])
    assert unexpected == (
        "init_from: the model has no old_head.bias and 1 more, which the source has;"
        " ignore it by init.unexpected=[PATTERN]"
    )
    model = assert_loaded(path, body, missing=["2.*"], unexpected=["old_*"])
    initial = network(0).state_dict()
    assert all(torch.equal(model.state_dict()[name], initial[name]) for name in head)
    nothing = refusal_of(assert_loaded, path, {}, missing=["*"], unexpected=["*"], rename=["^ -> x"])
    assert "no tensor of the source" in nothing


def test_a_wrong_shape_is_refused_unless_both_patterns_allow_it(tmp_path: Path) -> None:
    whole, path = state(), tmp_path / "a.safetensors"
    save_file({**whole, "2.weight": torch.ones(7, 4), "2.bias": torch.ones(7)}, path)
    for allowed in ({}, {"missing": ["2.*"]}, {"unexpected": ["2.*"]}):
        message = refusal_of(assert_loaded, path, {}, **allowed)
        assert "2.weight has shape (7, 4), and the model has (2, 4) and 1 more" in message
    body = {name: value for name, value in whole.items() if not name.startswith("2.")}
    assert_loaded(path, body, missing=["2.*"], unexpected=["2.*"])


def test_tied_tensors_load_from_any_of_their_names_into_tied_and_untied_models(tmp_path: Path) -> None:
    source = Tied()
    save_model(source, str(tmp_path / "tied.safetensors"))  # one name is stored, the other in the metadata
    torch.save({"head.weight": source.head.weight}, tmp_path / "head.pt")
    for name in ("tied.safetensors", "head.pt"):
        model = Tied()
        start_from(str(tmp_path / name), InitConfig(), model)
        assert model.head.weight is model.embed.weight and torch.equal(
            model.embed.weight, source.embed.weight
        )
    untied = Tied(tie=False)
    start_from(str(tmp_path / "tied.safetensors"), InitConfig(), untied)
    assert torch.equal(untied.head.weight, source.embed.weight) and torch.equal(
        untied.embed.weight, source.embed.weight
    )
    torch.save(Tied(tie=False).state_dict(), tmp_path / "untied.pt")
    message = refusal_of(start_from, str(tmp_path / "untied.pt"), InitConfig(), Tied())
    assert "head.weight of the source differs from another tensor that the model ties it to" in message


def test_values_are_cast_to_the_models_dtype_and_a_lossy_cast_is_noted(tmp_path: Path) -> None:
    whole = state()
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in whole.items()}
    save_file(halves, tmp_path / "bf16.safetensors")
    assert start_from(str(tmp_path / "bf16.safetensors"), InitConfig(), model := network(0)).notes == []
    assert all(torch.equal(value, halves[name].to(value.dtype)) for name, value in model.state_dict().items())
    save_file(whole, tmp_path / "a.safetensors")
    (note,) = start_from(str(tmp_path / "a.safetensors"), InitConfig(), network(0).bfloat16()).notes
    assert note == "init_from: 8 tensors are rounded from float32 to the model's bfloat16"
    save_file({**whole, "0.bias": torch.full((4,), 1e30)}, tmp_path / "large.safetensors")
    message = refusal_of(start_from, str(tmp_path / "large.safetensors"), InitConfig(), network(0).half())
    assert "0.bias has the value 1e+30, too large for the model's float16" in message
    save_file({**whole, "0.bias": torch.ones(4, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    message = refusal_of(assert_loaded, tmp_path / "int8.safetensors", {})
    assert "0.bias is int8, and the model has float32" in message


def test_a_file_that_could_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({**state(), "x": Executes(mark)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Executes(mark)))
    torch.save(network(), tmp_path / "module.pt")
    for name in ("zip.pt", "plain.pt", "module.pt"):
        message = refusal_of(assert_loaded, tmp_path / name, {})
        assert message.startswith(f"init_from: {tmp_path / name} ") and "could run code" in message
    assert not mark.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(tmp_path: Path, value: float) -> None:
    for name, save in (("a.safetensors", save_file), ("a.pt", torch.save)):
        damaged = state()
        damaged["2.bias"][-1] = value
        save(damaged, tmp_path / name)
        message = refusal_of(assert_loaded, tmp_path / name, {})
        assert message.startswith(f"init_from: {tmp_path / name}: 2.bias has values that are not finite")


def test_what_is_not_trained_may_have_infinities_as_masks_do_but_no_nan(tmp_path: Path) -> None:
    masked = state()
    masked["1.running_var"][0] = -torch.inf
    torch.save(masked, tmp_path / "mask.pt")
    assert_loaded(tmp_path / "mask.pt", masked)
    masked["1.running_var"][0] = torch.nan
    torch.save(masked, tmp_path / "mask.pt")
    assert "1.running_var has values" in refusal_of(assert_loaded, tmp_path / "mask.pt", {})


def test_a_state_dict_under_a_number_is_chosen_by_it(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in state().items()}
    torch.save({0: other, 1: state()}, tmp_path / "two.pt")
    assert_loaded(f"{tmp_path / 'two.pt'}:1", state())
    torch.save({7: state(), "epoch": 3}, tmp_path / "one.pt")
    assert_loaded(tmp_path / "one.pt", state())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("no.safetensors", lambda path: None, "does not exist, and nothing is downloaded"),
        ("cut.safetensors", lambda path: path.write_bytes(b"\xff" * 20), "is no complete safetensors file"),
        ("cut.pt", lambda path: path.write_bytes(b"PK\x03\x04rest"), "cannot be read"),
        ("a.onnx", lambda path: path.write_bytes(b""), "expected a .safetensors file"),
        ("pipe.safetensors", os.mkfifo, "expected a regular file, this is a pipe"),
        ("none.pt", lambda path: torch.save({"epoch": 3}, path), "has no state dict"),
        (
            "two.pt",
            lambda path: torch.save({"model": state(), "ema": state()}, path),
            "has several state dicts: model, ema; choose one: /",
        ),
        ("sparse.pt", lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path), "w is no dense tensor"),
        ("empty", os.mkdir, "has no weights"),
    ],
)
def test_what_is_no_source_is_refused_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / name)
    refused = refusal_of(assert_loaded, tmp_path / name, {})
    assert refused.startswith("init_from: ") and str(tmp_path / name) in refused and message in refused


def test_a_file_with_the_name_of_a_key_is_named_behind_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 3}, "init.pt")
    assert refusal_of(assert_loaded, "init.pt", {}).startswith("init_from: init.pt has no state dict")


def test_folders_with_several_weights_or_an_index_that_leaves_them_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("model.fp16", "model.fp32"):
        save_file(state(), folder / f"{name}.safetensors")
    message = refusal_of(assert_loaded, folder, {})
    assert "has several weights: model.fp16.safetensors, model.fp32.safetensors; choose one" in message
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "../other.safetensors"}}))
    assert "which is not a file beside it" in refusal_of(assert_loaded, folder, {})
    index.write_text(json.dumps({"weight_map": {"no.weight": "model.fp16.safetensors"}}))
    assert "has no tensor no.weight" in refusal_of(assert_loaded, folder, {})
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "unet" / "config.json").write_text("{}")
    (pipeline / "model_index.json").write_text("{}")
    assert "is a pipeline of several models; expected the folder of one: unet" in refusal_of(
        assert_loaded, pipeline, {}
    )

"""What a merge holds. The expected tensors are weighted sums in float64 that each test writes out; `from_pretrained`,
`load_file` and `load_model` read what was written.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

import launch.merging.writing
from launch.merge import main
from tests.exports import Tied, save_run
from tests.makers import resident

MINUS_SQRT = [(math.sqrt(j + 1) - math.sqrt(j)) / math.sqrt(3) for j in range(3)]
"""Coefficients of three checkpoints for the decay 1 - sqrt(x)."""


def weights(number: int) -> dict[str, Tensor]:
    """Tensors with what makes a merge hard: several types, an integer, a mask with infinities, no elements."""
    generator = torch.Generator().manual_seed(number)
    return {
        "layer.weight": torch.randn(5, 3, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(float(number)),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "count": torch.tensor(100 * number),
        "flag": torch.tensor([number > 1, False]),
        "mask": torch.full((2, 2), -math.inf).triu(1),
        "empty": torch.zeros(0, 4),
    }


def summed(values: list[float], sources: list[dict[str, Tensor]], name: str) -> Tensor:
    total = sum(x * one[name].double() for x, one in zip(values, sources, strict=True))
    return total.to(sources[-1][name].dtype)  # type: ignore[union-attr]


def merge(*arguments: object) -> int:
    return main([*map(str, arguments)])


def save_three(folder: Path, save: Callable[[dict[str, Tensor], Path], object], end: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"step_{100 * number}{end}" for number in (1, 2, 3)]
    for number, path in enumerate(paths, 1):
        save(weights(number), path)
    return paths


def assert_merged(found: dict[str, Tensor], values: list[float]) -> None:
    sources = [weights(number) for number in (1, 2, 3)]
    assert found.keys() == sources[0].keys()
    for name in ("layer.weight", "half", "scalar", "double"):
        torch.testing.assert_close(found[name], summed(values, sources, name), rtol=0, atol=1e-15)
    for name in ("count", "flag", "mask", "empty"):
        assert found[name].dtype == sources[-1][name].dtype
        assert torch.equal(found[name], sources[-1][name])


@pytest.mark.parametrize(
    ("save", "end"),
    [
        (save_file, ".safetensors"),
        (torch.save, ".pt"),
        (lambda tensors, path: torch.save({"model": tensors, "epoch": 3}, path), ".ckpt"),
        (lambda tensors, path: (path.mkdir(), save_file(tensors, path / "model.safetensors")), ""),
    ],
    ids=["safetensors", "pt", "ckpt", "folder"],
)
def test_checkpoints_of_every_kind_are_merged(tmp_path: Path, save: Any, end: str) -> None:
    save_three(tmp_path / "c", save, end)
    out = tmp_path / "merged.safetensors"
    assert merge(tmp_path / "c" / f"step_*{end}", "profile=minus_sqrt", f"out={out}") == 0
    assert_merged(load_file(out), MINUS_SQRT)


def test_files_may_be_read_and_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.merging.weights.PART", 4)
    save_three(tmp_path / "c", save_file, ".safetensors")
    out = tmp_path / "merged"
    arguments = ("profile=linear", f"out={out}", "max_shard_size=60")
    assert merge(tmp_path / "c" / "step_*", *arguments) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len({*index["weight_map"].values()}) > 1
    found = {name: load_file(out / file)[name] for name, file in index["weight_map"].items()}
    assert_merged(found, [1 / 3] * 3)


def test_the_window_takes_the_newest_by_their_steps(tmp_path: Path) -> None:
    for number in (9, 10, 11):  # 9 is the last by name
        save_file({"w": torch.tensor([float(number)])}, tmp_path / f"epoch=1-step={number}.safetensors")
    out = tmp_path / "merged.safetensors"
    assert merge(tmp_path / "*.safetensors", "profile=uniform", "window=2", f"out={out}") == 0
    assert load_file(out)["w"].item() == 10.5


def test_given_coefficients_are_used_in_the_given_order(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        tensors = {
            "w": torch.tensor([float(number)]),
            "n": torch.tensor(number),
            "mask": torch.tensor(-math.inf),
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    out = tmp_path / "merged.safetensors"
    assert merge(*files, "coefficients=[1.25,-0.25]", f"out={out}") == 0
    found = load_file(out)
    assert found["w"].item() == 1.25 and found["n"].item() == 0
    assert found["mask"].item() == -math.inf  # the same in both, and no sum of infinities


def test_given_coefficients_stay_with_their_checkpoints_and_the_latest_step_is_the_newest(
    tmp_path: Path,
) -> None:
    paths = save_three(tmp_path / "c", save_file, ".safetensors")
    out = tmp_path / "merged.safetensors"
    assert merge(*paths[::-1], "coefficients=[0.5,0.3,0.2]", f"out={out}") == 0
    assert_merged(load_file(out), [0.2, 0.3, 0.5])


@pytest.mark.parametrize("write", ["npy", "txt"])
def test_a_profile_in_a_file_has_one_weight_a_step(tmp_path: Path, write: str) -> None:
    import numpy as np

    save_three(tmp_path / "c", save_file, ".safetensors")
    row = np.zeros(201)
    row[[0, 100, 200]] = [0.5, 0.125, 0.375]
    (np.save if write == "npy" else np.savetxt)(tmp_path / f"row.{write}", row)
    out = tmp_path / "merged.safetensors"
    assert merge(tmp_path / "c" / "step_*", f"profile={tmp_path / f'row.{write}'}", f"out={out}") == 0
    assert_merged(load_file(out), [0.5, 0.125, 0.375])


def test_a_decay_and_a_schedule_are_profiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_three(tmp_path / "c", save_file, ".safetensors")
    pattern = tmp_path / "c" / "step_*"
    assert merge(pattern, "profile=decay:0.9", f"out={tmp_path / 'decay.safetensors'}") == 0
    printed = capsys.readouterr().out
    assert "closest to the profile" in printed and "predicted error" in printed
    # The decay 1 until 80 % of the window: the tail sums are 1, 1, and (1 - 2/3) / 0.2 capped at 1.
    assert merge(pattern, "profile=wsd", f"out={tmp_path / 'wsd.safetensors'}") == 0
    assert_merged(load_file(tmp_path / "wsd.safetensors"), [0.0, 0.0, 1.0])


def test_checkpoints_of_a_run_are_merged_live_or_averaged(tmp_path: Path) -> None:
    run_dir, _ = save_run(tmp_path, Tied(), steps=(2, 4))
    (run_dir.checkpoints / "step-00000006.tmp").mkdir()  # of a run that is writing it
    from launch.export import main as export

    for weights_of in ("live", "ema/0.5"):
        name = weights_of.replace("/", "-")
        for step in (2, 4):
            out = f"out={tmp_path / f'{name}-{step}.safetensors'}"
            assert (
                export(
                    [
                        str(run_dir.path),
                        f"weights={weights_of}",
                        f"step={step}",
                        out,
                        "allow_targets=[tests.]",
                    ]
                )
                == 0
            )
        assert (
            merge(f"{run_dir.path}:{weights_of}", "profile=linear", f"out={tmp_path / f'{name}.safetensors'}")
            == 0
        )
        first, last = (load_file(tmp_path / f"{name}-{step}.safetensors") for step in (2, 4))
        found = load_file(tmp_path / f"{name}.safetensors")
        assert torch.equal(found["norm.weight"], summed([0.5, 0.5], [first, last], "norm.weight"))
        assert torch.equal(found["head.weight"], summed([0.5, 0.5], [first, last], "embed.weight"))
        assert torch.equal(found["norm.num_batches_tracked"], last["norm.num_batches_tracked"])


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    for step in (1, 2):
        save_model(Tied(), str(tmp_path / f"step_{step}.safetensors"))
    out = tmp_path / "merged.safetensors"
    assert merge(tmp_path / "step_*", "profile=linear", f"out={out}") == 0
    plain = Tied()
    assert load_model(plain, out) == (set(), [])
    assert plain.head.weight is plain.embed.weight
    with safe_open(out, "pt") as file:
        assert file.metadata()["head.weight"] == "embed.weight"


def test_a_folder_of_transformers_is_loaded_by_from_pretrained(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    models = []
    for step in (10, 20):
        torch.manual_seed(step)
        models.append(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=4))
        )
        models[-1].save_pretrained(tmp_path / f"checkpoint-{step}")
        torch.save({}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    out = tmp_path / "merged"
    assert merge(tmp_path / "checkpoint-*", "profile=uniform", f"out={out}/") == 0
    assert not (out / "optimizer.pt").exists()
    loaded = GPT2LMHeadModel.from_pretrained(out).state_dict()
    both = [model.state_dict() for model in models]
    for name in loaded:
        assert torch.equal(loaded[name], summed([0.5, 0.5], both, name)), name


def test_a_folder_of_diffusers_keeps_its_file_names_and_configuration(tmp_path: Path) -> None:
    name = "diffusion_pytorch_model"
    for step, other in ((10, "1"), (20, "2")):
        folder = tmp_path / f"checkpoint-{step}" / "unet"
        folder.mkdir(parents=True)
        save_file(weights(step), folder / f"{name}.safetensors")
        (folder / "config.json").write_text(f'{{"_class_name": "UNet", "one": {other}}}')
    out = tmp_path / "merged"
    assert merge(tmp_path / "checkpoint-*" / "unet", "profile=uniform", f"out={out}") == 0
    assert {path.name for path in out.iterdir()} == {f"{name}.safetensors", "config.json"}
    assert json.loads((out / "config.json").read_text())["one"] == 2


def test_the_metadata_names_sources_digests_and_coefficients(tmp_path: Path) -> None:
    import hashlib

    paths = save_three(tmp_path / "c", save_file, ".safetensors")
    out = tmp_path / "merged.safetensors"
    assert merge(*paths, "profile=minus_sqrt", f"out={out}") == 0
    with safe_open(out, "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pt"
    merged = json.loads(facts["merge"])
    assert merged["profile"] == "minus_sqrt"
    assert [one["coefficient"] for one in merged["sources"]] == pytest.approx(MINUS_SQRT, abs=1e-12)
    assert [one["step"] for one in merged["sources"]] == [100, 200, 300]
    for one, path in zip(merged["sources"], paths, strict=True):
        assert one["path"] == str(path)
        assert one["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def test_a_part_of_a_tensor_with_long_rows_is_a_part_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in stacked experts; the memory is bounded by PART, whatever the shape."""
    torch.save({"w": torch.arange(24.0).view(2, 1, 4, 3)}, tmp_path / "step_1.pt")
    save_file({"w": torch.ones(2, 1, 4, 3)}, tmp_path / "step_2.safetensors")
    for most, expected in ((1, 1), (2, 2), (3, 3), (7, 6), (24, 24)):
        sizes: list[int] = []
        monkeypatch.setattr("launch.merging.weights.PART", most)
        monkeypatch.setattr(
            "launch.merging.weights.same_bits", lambda part, other, n=sizes: n.append(part.numel())
        )
        out = tmp_path / f"merged_{most}.safetensors"
        assert merge(tmp_path / "step_*", "profile=linear", f"out={out}") == 0
        assert load_file(out)["w"].flatten().tolist() == [(x + 1) / 2 for x in range(24)]
        assert max(sizes) == expected


def sparse(path: Path, megabytes: int) -> None:
    """A safetensors file with holes: two tensors of zeros that take no room on the disk."""
    each = megabytes << 19
    header = json.dumps(
        {
            name: {
                "dtype": "BF16",
                "shape": [1024, each >> 11],
                "data_offsets": [number * each, (number + 1) * each],
            }
            for number, name in enumerate(("a", "b"))
        }
    ).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * each)


def test_large_checkpoints_need_the_memory_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.merging.weights.PART", 1 << 19)
    for step, megabytes in ((1, 64), (2, 64), (10, 1), (20, 1)):
        sparse(tmp_path / f"{megabytes}MB_step_{step}.safetensors", megabytes)
    assert merge(tmp_path / "1MB*", "profile=linear", f"out={tmp_path / 'small.safetensors'}") == 0
    written, most = launch.merging.writing._put, [0]

    def watched(*arguments: Any) -> None:
        # Pages of mapped files are left out: the system may drop them at any time.
        most.append(resident("RssAnon"))
        written(*arguments)

    monkeypatch.setattr("launch.merging.writing._put", watched)
    before = resident("RssAnon")
    out = tmp_path / "merged.safetensors"
    assert merge(tmp_path / "64MB*", "profile=linear", f"out={out}") == 0
    assert out.stat().st_size > 64 << 20 and len(most) > 64
    # Each tensor alone takes 128 MiB in float64; the allocator keeps some parts.
    assert max(most) - before < 96 << 20

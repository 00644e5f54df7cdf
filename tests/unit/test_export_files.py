"""Where an export goes. Sizes and file names are those of Hugging Face's conventions, written out here."""

import json
import os
from pathlib import Path

import pytest

from launch.exporting.files import Destination, index_name, index_text, parse_out, parse_size, split
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("1.5 MB", 1_500_000),
        ("2GiB", 2_147_483_648),
        ("10kb", 10_000),
        ("123", 123),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5 apples", "0.0001KB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^max_shard_size: expected a size"):
        parse_size(text)


def test_a_name_with_the_suffix_is_a_file_and_any_other_a_folder() -> None:
    assert not parse_out("a/model.safetensors").is_folder
    assert all(
        parse_out(f"gpt{end}").is_folder
        for end in ("-0.999", "-3.1b", ".v2", ".final", "2-v1.5", "0.5", ".p", ".opt")
    )
    assert parse_out("gpt.pt/").is_folder
    assert str(parse_out("gpt/")) == "gpt/"


@pytest.mark.parametrize("text", ["", "/", "..", "model.pt", "model.BIN", "model.safetensors/"])
def test_other_formats_and_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^out: expected FILE\.safetensors or FOLDER/"):
        parse_out(text)


@pytest.mark.parametrize("suffix", ["safetensor", "Safetensors", "safetensros", "saftensors"])
def test_a_file_whose_suffix_is_mistyped_is_refused_and_a_slash_makes_it_a_folder(suffix: str) -> None:
    with pytest.raises(ConfigError, match=rf"^out: expected FILE\.safetensors or FOLDER/, got m\.{suffix}$"):
        parse_out(f"m.{suffix}")
    assert parse_out(f"m.{suffix}/").is_folder


def test_tensors_fill_files_in_their_order_and_a_large_one_has_its_own() -> None:
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 10}
    assert split(sizes, "model", 10) == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e"],
    }
    assert split(sizes, "model", 51) == {"model.safetensors": list(sizes)}


def test_index_has_the_form_that_from_pretrained_reads() -> None:
    text = index_text({"x-00001-of-00002.safetensors": ["b"], "x-00002-of-00002.safetensors": ["a"]}, 7)
    assert json.loads(text) == {
        "metadata": {"total_size": 7},
        "weight_map": {"a": "x-00002-of-00002.safetensors", "b": "x-00001-of-00002.safetensors"},
    }
    assert index_name("x") == "x.safetensors.index.json"


def test_a_folder_appears_whole_with_permissions_of_the_user(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with Destination(tmp_path / "gpt").written_aside() as aside:
            (aside / "model.safetensors").write_text("weights")
            (aside / "model.safetensors").chmod(0o600)
            assert not (tmp_path / "gpt").exists()
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt"]
    assert (tmp_path / "gpt" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_several_files_are_put_beside_each_other(tmp_path: Path) -> None:
    with Destination(tmp_path / "m.safetensors").written_aside() as aside:
        for name in ("m.safetensors.index.json", "m-1.safetensors", "m-2.safetensors"):
            (aside / name).write_text(name)
    assert {path.name for path in tmp_path.iterdir()} == {
        "m.safetensors.index.json",
        "m-1.safetensors",
        "m-2.safetensors",
    }


@pytest.mark.parametrize("name", ["m.safetensors", "gpt"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_one_leaves_nothing(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    with pytest.raises(error), Destination(tmp_path / name).written_aside() as aside:
        (aside / "m.safetensors").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_between_two_files_takes_the_first_away_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "m-2.safetensors":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        Destination(tmp_path / "m.safetensors").written_aside() as aside,
    ):
        for name in ("m-1.safetensors", "m-2.safetensors"):
            (aside / name).write_text(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["m.safetensors", "gpt"])
def test_what_appeared_meanwhile_is_not_written_over(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ConfigError, match=f"^out: .*{name} exists already"),
        Destination(tmp_path / name).written_aside() as aside,
    ):
        (aside / "m.safetensors").write_text("ours")
        (tmp_path / name).write_text("theirs")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "theirs")]


def test_a_dangling_link_and_one_of_several_files_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"link\.safetensors exists already"):
        Destination(tmp_path / "link.safetensors").require_free()
    (tmp_path / "m-00002-of-00002.safetensors").touch()
    with pytest.raises(ConfigError, match=r"m-00002-of-00002\.safetensors exists already"):
        Destination(tmp_path / "m.safetensors").require_free({"m-00002-of-00002.safetensors": None})


def test_a_folder_to_put_it_into_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^out: the folder .*missing for m\.safetensors does not exist"):
        Destination(tmp_path / "missing" / "m.safetensors").require_free()

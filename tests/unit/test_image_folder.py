"""Which files of an image folder are samples, and which pixels they have.

Expected pixels are those of the picture before it was saved, and of Pillow's `exif_transpose` and `convert`.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.makers import refusal_of
from trainer.data.held_out import is_held_out
from trainer.data.image_folder import ImageFiles, image_folder
from trainer.data.overlap import same_files
from trainer.protocols import Splits

SIZE = 16
RAMP = np.linspace(0, 255, SIZE * SIZE).astype(np.uint8).reshape(SIZE, SIZE)
"""Grey values from black to white."""
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], 2)


def seen(path: Path) -> np.ndarray:
    """What the model sees of a file, as 0 to 255, `[height, width, 3]`."""
    image = ImageFiles(str(path.parent), [(path.name, 0)], SIZE, "data.path").__getitems__([0])["image"][0]
    return ((image.permute(1, 2, 0) + 1) * 127.5).numpy()


def assert_seen(path: Path, expected: np.ndarray, tolerance: float = 0.01) -> None:
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, 2)
    assert np.abs(seen(path) - expected).max() <= tolerance


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_orientation_says(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(COLOURS).save(path, exif=exif)
    stored = tmp_path / f"stored.{suffix}"
    Image.fromarray(COLOURS).save(stored)
    turned = Image.open(stored)
    turned.getexif()[0x0112] = orientation
    assert_seen(path, np.asarray(ImageOps.exif_transpose(turned)))
    assert np.array_equal(seen(path), seen(stored)) == (orientation == 1)


@pytest.mark.parametrize("mode", ["P", "LA", "1", "CMYK", "I;16"])
def test_a_picture_is_turned_in_every_mode(mode: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image = Image.fromarray(RAMP.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(COLOURS)
    image = image if mode == "I;16" else image.convert(mode)
    suffix = "jpg" if mode == "CMYK" else "png"
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    image.save(tmp_path / f"stored.{suffix}")
    assert_seen(tmp_path / f"turned.{suffix}", np.rot90(seen(tmp_path / f"stored.{suffix}"), -1))


def test_a_damaged_exif_block_leaves_the_picture_as_stored(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "photo.png", exif=b"Exif\0\0garbage")
    assert_seen(tmp_path / "photo.png", RAMP)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_sixteen_bits_are_scaled_from_black_to_white(name: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / name)
    assert_seen(tmp_path / name, RAMP)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused_by_file_name(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "depth.tif")
    message = refusal_of(seen, tmp_path / "depth.tif")
    assert message.startswith(f"data.path: {tmp_path}/depth.tif cannot be read as an image: the range")


def test_a_tiff_whose_white_is_zero_is_refused_where_pillow_would_show_the_negative(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(RAMP.astype(np.uint16)).save(path)
    raw = path.read_bytes()
    tag = struct.pack("<HHIH", 262, 3, 1, 1)
    assert raw.count(tag) == 1
    path.write_bytes(raw.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0)))
    assert "0 is black" in refusal_of(seen, path)


def opaque(name: str) -> Image.Image:
    """A picture in each mode whose colours, without transparency, are known."""
    rgb, grey = Image.fromarray(COLOURS), Image.fromarray(RAMP)
    alpha = Image.fromarray(RAMP.T.copy())
    if name in ("RGBA", "LA"):
        image = (rgb if name == "RGBA" else grey).copy()
        image.putalpha(alpha)
        return image
    return {"P": rgb.quantize(8), "1": grey.point(lambda value: 255 * (value > 127)).convert("1")}[name]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGBA", {}),
        ("LA", {}),
        ("1", {}),
        ("P", {}),
        ("P", {"transparency": 3}),
        ("P", {"transparency": bytes([0, 100, 200, 255])}),
    ],
)
def test_transparency_is_dropped_and_palettes_are_looked_up(mode: str, options: dict, tmp_path: Path) -> None:
    image = opaque(mode)
    image.save(tmp_path / "x.png", **options)
    assert_seen(tmp_path / "x.png", np.asarray(image.convert("RGBA").convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_has_the_colours_of_the_picture(suffix: str, tmp_path: Path) -> None:
    """Pillow writes a JPEG in CMYK as Adobe does, inverted."""
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / f"x.{suffix}", quality=100)
    assert_seen(tmp_path / f"x.{suffix}", COLOURS, tolerance=6 if suffix == "jpg" else 0.01)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge(side: int = 20_000) -> bytes:
    """A PNG of one bit per pixel and 50 kB, of more pixels than may be decoded."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    lines = zlib.compress(b"\0" * ((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def broken_chunk(png: bytes) -> bytes:
    at = png.find(b"IDAT", png.find(b"IDAT") + 4)
    return png[:at] + b"\0" + png[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda png: b"",
        lambda png: b"not a PNG",
        lambda png: png[:20],
        lambda png: png[: len(png) // 2],
        broken_chunk,
        lambda png: huge(),
        lambda png: b"GIF89a" + b"\0" * 20,
        lambda png: b"II*\0\x08\0\0\0\xff\xff",
        lambda png: b"P6 10 -1 255 ",
    ],
)
def test_a_damaged_or_too_large_image_is_one_line_with_its_name(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "odd.png"
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(damage(path.read_bytes()))
    assert refusal_of(seen, path).startswith(f"data.path: {path} cannot be read as an image: ")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of 20 different pictures."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "root" / name / f"{number}.png")
    return tmp_path / "root"


def samples(root: Path) -> tuple[Splits, int]:
    splits = image_folder(str(root), 4, eval_fraction=0.3)
    return splits, len(splits.train) + len(splits.eval)


def test_what_systems_and_tools_leave_behind_is_no_sample_and_no_class(root: Path) -> None:
    plain, _ = samples(root)
    picture = (root / "cat/0.png").read_bytes()
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".hidden"):
        for above in (root, root / "cat", root / "cat" / "deeper"):
            (above / folder).mkdir(parents=True)
            (above / folder / "0.png").write_bytes(picture)
    for name in ("._0.png", ".0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
        (root / "cat" / name).write_bytes(picture)
        (root / name).write_bytes(picture)
    (root / "__MACOSX").joinpath("._cat").touch()
    splits, count = samples(root)
    assert count == 40
    assert splits.facts == plain.facts
    assert splits.train.paths == plain.train.paths  # type: ignore[attr-defined]


def test_a_class_without_images_is_a_class_and_named_in_a_warning(root: Path) -> None:
    """Left out, it would change the labels of the classes after it, and runs of earlier versions could not resume."""
    (root / "empty" / "deeper").mkdir(parents=True)
    (root / "bird").mkdir()
    (root / "bird" / ".hidden.png").touch()
    splits, count = samples(root)
    assert (count, splits.facts["num_classes"]) == (40, 4)
    dogs = [path for path in splits.train.paths if "dog" in path]  # type: ignore[attr-defined]
    label = splits.train.__getitems__([splits.train.paths.index(dogs[0])])["label"]  # type: ignore[attr-defined]
    assert label.tolist() == [2]
    (warning,) = splits.warnings
    assert "classes without images: bird, empty" in warning


def test_a_broken_link_that_is_no_image_and_no_class_is_left_out_with_a_warning(root: Path) -> None:
    for link in ("cat/gone", "dog/notes.txt", "labels.txt"):
        (root / link).symlink_to("nowhere")
    splits, count = samples(root)
    assert (count, splits.facts["num_classes"]) == (40, 2)
    (warning,) = splits.warnings
    assert "broken links are left out" in warning and "cat/gone" in warning and "dog/notes.txt" in warning


def test_a_class_that_a_split_has_no_picture_of_is_warned_about(root: Path) -> None:
    names = [f"bird/{number}.png" for number in range(100)]
    for held_out, split in ((True, "training"), (False, "evaluation")):
        (root / "bird").mkdir()
        only = root / next(name for name in names if is_held_out(name, 0.3) == held_out)
        Image.new("RGB", (4, 4)).save(only)
        assert samples(root)[0].warnings == [f"data.eval_fraction: no {split} picture of bird"]
        only.unlink()
        (root / "bird").rmdir()


def test_linked_folders_are_read_once(root: Path, tmp_path: Path) -> None:
    (root / "cat").rename(tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "part").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "part" / "black.png")
    (tmp_path / "elsewhere" / "again").symlink_to("part")
    splits, count = samples(root)
    assert count == 41
    assert splits.facts["num_classes"] == 2


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("cat/up", "..", "a link to a folder that contains it"),
        ("cat/same", ".", "a link to a folder that contains it"),
        ("all", ".", "a link to a folder that contains it"),
        ("cat/dogs", "../dog", "is the same folder as"),
        ("bird", "dog", "is the same folder as"),
        ("gone", "nowhere", "is a broken link; as a class it would change the labels"),
        ("cat/99.png", "nowhere.png", "is a broken link"),
        ("self", "self", "is a broken link"),
    ],
)
def test_a_link_that_cannot_be_followed_is_refused_by_name(
    link: str, target: str, words: str, root: Path
) -> None:
    (root / link).symlink_to(target)
    message = refusal_of(samples, root)
    assert words in message
    assert Path(link).name in message or "dog" in message


def test_a_pipe_is_refused_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "cat" / "pipe.png")
    assert "pipe.png is not a file" in refusal_of(samples, root)


def test_a_name_that_is_no_text_is_a_sample_too(root: Path) -> None:
    (root / "cat" / "0.png").rename(str(root / "cat") + "/\udcff.png")
    assert samples(root)[1] == 40


def test_an_evaluation_folder_may_lack_classes_and_has_no_further_ones(root: Path, tmp_path: Path) -> None:
    """The labels are those of the training classes, and a warning names the classes that are not evaluated."""
    (tmp_path / "val" / "dog").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "dog" / "1.png")
    few, many = str(tmp_path / "val"), str(root)
    splits = image_folder(many, 4, eval_path=few)
    assert splits.eval.__getitems__([0])["label"].tolist() == [1]
    assert splits.warnings == ["data.eval_path: no evaluation picture of cat"]
    assert refusal_of(image_folder, few, 4, eval_path=many).endswith("data.path does not have: cat")


def test_a_picture_of_both_splits_is_warned_about_in_one_line(root: Path, tmp_path: Path) -> None:
    splits, _ = samples(root)
    assert not splits.warnings
    names = [f"cat/copy{number}.png" for number in range(100)]
    held_out = next(name for name in names if is_held_out(name, 0.3))
    (root / held_out).write_bytes(Path(splits.train.paths[0]).read_bytes())  # type: ignore[attr-defined]
    (warning,) = samples(root)[0].warnings
    assert warning.startswith("data.path: of ")
    assert "at least 1 are in the training split too" in warning
    assert f"{root / held_out} is {splits.train.paths[0]}" in warning  # type: ignore[attr-defined]
    (warning,) = image_folder(str(root), 4, eval_path=str(root)).warnings
    assert warning.startswith("data.eval_path: of 41 evaluation pictures, at least 41 ")


def test_pictures_of_equal_size_are_no_copies(root: Path) -> None:
    """All files of a format without compression have one size."""
    for path in root.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    splits, count = samples(root)
    assert count == 40
    assert not splits.warnings


def test_files_that_differ_in_their_first_byte_only_are_no_copies(tmp_path: Path) -> None:
    for name, first in (("a", b"1"), ("b", b"2"), ("copy", b"2")):
        (tmp_path / name).write_bytes(first + bytes(20_000))
    train, copy = [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "copy")
    assert same_files(train, [copy]) == [(copy, train[1])]
    assert same_files(train[:1], [copy]) == []

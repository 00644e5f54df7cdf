"""The data set of a folder of images with one subfolder per class.

Images are not augmented (for example flipped). A sample depends only on its index, so resumed and uninterrupted runs
see the same pixels.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data.held_out import check_eval_fraction, is_held_out
from trainer.errors import ConfigError
from trainer.protocols import Batch, Splits

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class ImageFiles:
    """Data set of image files, which are decoded when a sample is read.

    Args:
        root: folder that contains the files.
        files: path below `root` and class of each file.
        image_size: height and width of the samples in pixels.
        key: config key of `root`, for error messages.
    """

    def __init__(self, root: str, files: Sequence[tuple[str, int]], image_size: int, key: str) -> None:
        self._root, self._files, self._image_size, self._key = root, files, image_size, key

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch `{"image": float32 [b, 3, size, size] in [-1, 1], "label": int64 [b]}`.

        Raises:
            ConfigError: A file cannot be decoded.
        """
        return {
            "image": torch.stack([self._image(self._files[index][0]) for index in indices]),
            "label": torch.tensor([self._files[index][1] for index in indices]),
        }

    def _image(self, name: str) -> Tensor:
        from PIL import Image  # only this data set needs it

        try:
            with Image.open(Path(self._root, name)) as file:
                image = file.convert("RGB")
        except OSError as error:
            path = Path(self._root, name)
            raise ConfigError(f"{self._key}: {path} cannot be read as an image ({error})") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # Cropped before resizing, because a resize of a box also uses pixels outside of the box.
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((self._image_size, self._image_size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_folder(
    path: str, image_size: int, eval_fraction: float = 0.1, eval_path: str | None = None
) -> Splits:
    """Load RGB images by class: the largest centred square of each image, resized.

    The class of an image is the index of its folder in the sorted folder names.

    Args:
        path: folder with one subfolder per class; the images of a class may be at any depth below its subfolder.
        image_size: height and width of the samples in pixels, at least 1.
        eval_fraction: expected fraction of the files that is kept for evaluation, in (0, 1); a hash of the name of each
            file decides. Not used with `eval_path`.
        eval_path: folder with the evaluation images, in the same layout; then all images of `path` are for training.
            None takes the evaluation images from `path`.

    Raises:
        ConfigError: A folder is missing or has no images, `eval_path` has other classes, or an argument is out of
            range.
    """
    check_eval_fraction(eval_fraction)
    if image_size < 1:
        raise ConfigError(f"data.image_size: {image_size} is not at least 1")
    classes = _classes(path, "data.path")
    files = _files(path, classes, "data.path")
    if eval_path is None:
        train = [file for file in files if not is_held_out(file[0], eval_fraction)]
        evaluation = [file for file in files if is_held_out(file[0], eval_fraction)]
        if not train or not evaluation:
            raise ConfigError(
                f"data.path: {path} has too few images ({len(files)}) to split by data.eval_fraction"
            )
        eval_root, eval_key = path, "data.path"
    else:
        if unknown := sorted(set(_classes(eval_path, "data.eval_path")) - set(classes)):
            raise ConfigError(
                f"data.eval_path: classes that data.path does not have: {', '.join(unknown[:5])}"
            )
        train, evaluation = files, _files(eval_path, classes, "data.eval_path")
        eval_root, eval_key = eval_path, "data.eval_path"
    return Splits(
        ImageFiles(path, train, image_size, "data.path"),
        ImageFiles(eval_root, evaluation, image_size, eval_key),
        {"image_shape": [3, image_size, image_size], "num_classes": len(classes)},
    )


def _classes(root: str, key: str) -> list[str]:
    if not os.path.isdir(root):
        raise ConfigError(f"{key}: {root} is not a folder")
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")


def _files(root: str, classes: list[str], key: str) -> list[tuple[str, int]]:
    files = [
        (os.path.relpath(os.path.join(folder, name), root), label)
        for label, name_of_class in enumerate(classes)
        for folder, _, names in os.walk(os.path.join(root, name_of_class))
        for name in names
        if name.lower().endswith(_SUFFIXES)
    ]
    if not files:
        raise ConfigError(f"{key}: {root} has no images in subfolders, expected {root}/CLASS/IMAGE")
    return sorted(files)

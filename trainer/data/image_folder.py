"""The data set of a folder of images with one subfolder per class.

Without transforms a sample depends only on its index, with transforms also on its place in the run, so resumed and
uninterrupted runs see the same pixels.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.augmentation import Change, augmented_by
from trainer.data.class_folders import class_names, images_by_class
from trainer.data.decoding import check_image_size, read_rgb, square_of
from trainer.data.held_out import check_eval_fraction, is_held_out
from trainer.data.overlap import same_files
from trainer.errors import ConfigError, blamed_on, listed
from trainer.protocols import Batch, Splits

if TYPE_CHECKING:
    from PIL.Image import Image


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

    @property
    def paths(self) -> list[str]:
        """Path of each file."""
        return [self._path(index) for index in range(len(self))]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch `{"image": float32 [b, 3, size, size] in [-1, 1], "label": int64 [b]}`.

        Raises:
            ConfigError: A file cannot be decoded.
        """
        return self.batch(indices)

    def batch(self, indices: Sequence[int], change: Change | None = None) -> Batch:
        """Return the batch of `__getitems__` with changed pictures (`trainer.data.augmentation.Pictures`)."""
        images = []
        for number, index in enumerate(indices):
            image = self._read(index)
            if change is not None:
                image = change(number, image, self._path(index))
            images.append(square_of(image, self._image_size))
        labels = torch.tensor([self._files[index][1] for index in indices])
        return {"image": torch.stack(images), "label": labels}

    def _path(self, index: int) -> str:
        return os.path.join(self._root, self._files[index][0])

    def _read(self, index: int) -> "Image":
        path = self._path(index)
        with blamed_on(f"{self._key}: {path} cannot be read as an image"):
            return read_rgb(path)


def image_folder(
    path: str,
    image_size: int,
    eval_fraction: float = 0.1,
    eval_path: str | None = None,
    transforms: Sequence[Callable[..., Any]] | None = None,
) -> Splits:
    """Load RGB images by class: the largest centred square of each image, resized.

    The class of an image is the index of its folder in the sorted folder names.

    Args:
        path: folder with one subfolder per class; the images of a class may be at any depth below its subfolder. Links
            to folders are followed. Hidden names and folders of the system (`__MACOSX`) are skipped.
        image_size: height and width of the samples in pixels, 1 to 10,000.
        eval_fraction: expected fraction of the files that is kept for evaluation, in (0, 1); a hash of the name of each
            file decides. Not used with `eval_path`.
        eval_path: folder with the evaluation images, in the same layout, of all classes or of some; then all images of
            `path` are for training. None takes the evaluation images from `path`.
        transforms: callables (`trainer.data.augmentation`) that change each training picture; the evaluation pictures
            stay as they are. None changes nothing.

    Raises:
        ConfigError: A folder is missing or has no images, `eval_path` has further classes, a link to an image is
            broken, a link is a loop, a transform cannot be called or fails on the first picture, or an argument is out
            of range.
    """
    check_eval_fraction(eval_fraction)
    check_image_size(image_size)
    classes = class_names(path, "data.path")
    files, warnings = images_by_class(path, classes, "data.path")
    if eval_path is None:
        train = [file for file in files if not is_held_out(file[0], eval_fraction)]
        evaluation = [file for file in files if is_held_out(file[0], eval_fraction)]
        if not train or not evaluation:
            raise ConfigError(
                f"data.path: {path} has too few images ({len(files)}) to split by data.eval_fraction"
            )
        eval_root, eval_key, chosen_by = path, "data.path", "data.eval_fraction"
    else:
        eval_root, eval_key, chosen_by = eval_path, "data.eval_path", "data.eval_path"
        train = files
        evaluation, more = _evaluation_images(eval_root, classes, eval_key)
        warnings += more
    pictures = ImageFiles(path, train, image_size, "data.path")
    train_set = augmented_by(transforms, pictures)
    eval_set = ImageFiles(eval_root, evaluation, image_size, eval_key)
    facts = {"image_shape": [3, image_size, image_size], "num_classes": len(classes), "classes": classes}
    present = {label for _, label in files}
    warnings += _lacking(chosen_by, classes, present, train, "training")
    warnings += _lacking(chosen_by, classes, present, evaluation, "evaluation")
    return Splits(train_set, eval_set, facts, warnings + _leaks(pictures, eval_set, eval_key))


def _evaluation_images(root: str, classes: list[str], key: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the path below `root` and the class of each evaluation image, and warnings.

    A class is its position among the training classes.
    """
    names = class_names(root, key)
    files, warnings = images_by_class(root, names, key)
    position = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in names if name not in position]:
        raise ConfigError(f"{key}: classes that data.path does not have: {listed(unknown)}")
    return [(path, position[names[label]]) for path, label in files], warnings


def _lacking(
    key: str, classes: list[str], expected: set[int], files: list[tuple[str, int]], split: str
) -> list[str]:
    """Return a warning if a split, whose files `key` decided, has no pictures of some of the expected classes.

    `files` has path and class of each picture, and `expected` the classes that have pictures.
    """
    present = {label for _, label in files}
    lacking = [classes[label] for label in sorted(expected - present)]
    return [f"{key}: no {split} picture of {listed(lacking)}"] if lacking else []


def _leaks(train: ImageFiles, evaluation: ImageFiles, key: str) -> list[str]:
    """Return a warning if pictures are in both splits, else nothing."""
    with blamed_on(key):
        same = same_files(train.paths, evaluation.paths)
    if not same:
        return []
    return [
        f"{key}: of {len(evaluation)} evaluation pictures, at least {len(same)} are in the training split too:"
        f" {same[0][0]} is {same[0][1]}"
    ]

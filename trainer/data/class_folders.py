"""List the images of a folder with one subfolder per class."""

import os
from collections.abc import Iterator

from trainer.errors import ConfigError, blamed_on, listed

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Folders that systems make. Hidden ones (.ipynb_checkpoints) and files (._1.png, .DS_Store) begin with a dot.
_OF_THE_SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


def class_names(root: str, key: str) -> list[str]:
    """Return the sorted names of the class folders of `root`.

    Raises:
        ConfigError: `root` is no folder or cannot be read, or a broken link in it may be a class.
    """
    if not os.path.isdir(root):
        raise ConfigError(f"{key}: {root} is not a folder")
    entries = _entries(root, key)
    for entry in entries:
        if _is_broken(entry) and not os.path.splitext(entry.name)[1]:
            raise ConfigError(f"{key}: {entry.path} is a broken link; as a class it would change the labels")
    return sorted(entry.name for entry in entries if entry.is_dir())


def images_by_class(root: str, classes: list[str], key: str) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the path below `root` and the class of each image, sorted, and warnings.

    Symbolic links are followed; a folder that is reached twice is read once. As in torchvision, a broken link without
    the suffix of an image is left out. A class without images is a class, so that it does not change the labels.

    Args:
        root: folder with one subfolder per class; images may be at any depth in it.
        classes: names of these subfolders; a class is its position among them.
        key: config key of `root`, for errors.

    Raises:
        ConfigError: There are no images, or a link is a broken image, a loop, or leads to a folder of another class.
    """
    walk = _Walk(root, key)
    files = [(name, label) for label, folder in enumerate(classes) for name in walk.images(folder, folder)]
    if not files:
        raise ConfigError(f"{key}: {root} has no images in subfolders, expected {root}/CLASS/IMAGE")
    warnings = [f"{key}: broken links are left out: {listed(walk.broken)}"] if walk.broken else []
    full = {label for _, label in files}
    if empty := [name for label, name in enumerate(classes) if label not in full]:
        warnings.append(f"{key}: classes without images: {listed(empty)}; a folder that is no class must go")
    return sorted(files), warnings


class _Walk:
    """Walk through the folders of a root that remembers which it has read."""

    def __init__(self, root: str, key: str) -> None:
        self._root, self._key = root, key
        self._read: dict[str, tuple[str, str]] = {}
        """Name and class of each folder by its path without links."""
        self._above = [os.path.realpath(root)]
        self.broken: list[str] = []
        """Paths of broken links that have not the suffix of an image."""

    def images(self, folder: str, name_of_class: str) -> Iterator[str]:
        """Yield the paths below the root of the images in `folder`, a path below the root, and in its subfolders."""
        path = os.path.join(self._root, folder)
        real = os.path.realpath(path)
        if real in self._above:
            raise ConfigError(f"{self._key}: {path} is a link to a folder that contains it")
        other, other_class = self._read.setdefault(real, (folder, name_of_class))
        if other_class != name_of_class:
            raise ConfigError(
                f"{self._key}: {path} is the same folder as {os.path.join(self._root, other)}, of another class"
            )
        if other != folder:
            return
        self._above.append(real)
        for entry in _entries(path, self._key):
            name = os.path.join(folder, entry.name)
            is_image = entry.name.lower().endswith(_SUFFIXES)
            if entry.is_dir():
                yield from self.images(name, name_of_class)
            elif _is_broken(entry):
                if is_image:
                    raise ConfigError(f"{self._key}: {entry.path} is a broken link")
                self.broken.append(entry.path)
            elif is_image:
                if not entry.is_file():
                    raise ConfigError(f"{self._key}: {entry.path} is not a file")
                yield name
        self._above.pop()


def _entries(folder: str, key: str) -> list[os.DirEntry[str]]:
    """Return what a folder holds, without hidden names and the system's; links come last."""
    with blamed_on(f"{key}: {folder}"), os.scandir(folder) as found:
        entries = [
            entry for entry in found if entry.name[0] != "." and entry.name.lower() not in _OF_THE_SYSTEM
        ]
        return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))


def _is_broken(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)

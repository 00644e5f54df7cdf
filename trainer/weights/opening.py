"""What the text of `init_from` names: a file, a folder of a library, or weights of a run directory."""

import os
import re
from pathlib import Path

from trainer.errors import ConfigError, listed
from trainer.rundir.directory import is_run_directory
from trainer.rundir.inherited import split_step
from trainer.rundir.keys import LIVE
from trainer.weights.run_directory import RunWeights
from trainer.weights.safetensors_files import SUFFIX, SafetensorsFiles, read_index
from trainer.weights.source import Source
from trainer.weights.torch_files import SUFFIXES, TorchFiles

INDEX = ".index.json"
STEMS = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
"""File names, without suffix, that transformers, diffusers and peft give to the weights in a folder."""
EXPECTED = (
    "expected a .safetensors file, a file of torch.save (.pt, .pth, .bin, .ckpt), a folder with such weights, or"
    " RUN_DIR[:live|:ema/NAME][@STEP]"
)


def open_source(text: str) -> Source:
    """Open the source of weights that a text names; a path is relative to the working directory.

    A text that is the path of a file or folder means that, whatever characters it has.

    Args:
        text: `FILE`, `FILE.pt:KEY`, `FOLDER` or `RUN_DIR[:live|:ema/NAME][@STEP]`; without a name, the live weights,
            and without a step, the last checkpoint.

    Raises:
        ConfigError: There is no such source, it cannot be read, or the text may mean several.

    Collectives: those of `RunWeights`, for a run directory.
    """
    path, name, step = split_source(text)
    if path.is_dir() and is_run_directory(path):
        return RunWeights(path, name or LIVE, int(step) if step and step.isdecimal() else step or "last")
    if step is not None:
        raise ConfigError(f"{path} is no run directory, so @{step} has no meaning")
    files = _files_in(path) if path.is_dir() else path
    if files.name.endswith(SUFFIXES) or files.name.endswith(f".bin{INDEX}"):
        several = sorted({*read_index(files).values()}) if files.name.endswith(INDEX) else [files]
        return TorchFiles(path, several, name)
    if name is not None:
        raise ConfigError(f"{path} has one set of weights; expected nothing after it, got :{name}")
    if files.name.endswith(SUFFIX):
        return SafetensorsFiles(files)
    if files.name.endswith(f"{SUFFIX}{INDEX}"):
        return SafetensorsFiles(path, read_index(files))
    raise ConfigError(f"{EXPECTED}, got {path}")


def split_source(text: str) -> tuple[Path, str | None, str | None]:
    """Return path, name and step of a source; name and step are None if the text has none.

    Raises:
        ConfigError: No part of the text is an existing path.
    """
    whole, step = split_step(text)
    if os.path.exists(whole):
        return Path(whole), None, step
    for colon in re.finditer(":", whole):
        path, name = whole[: colon.start()], whole[colon.end() :]
        if name and path and os.path.exists(path):
            return Path(path), name, step
    raise ConfigError(f"{text} does not exist, and nothing is downloaded; {EXPECTED}")


def _files_in(folder: Path) -> Path:
    """Return the only file or index with weights in a folder: safetensors before files of `torch.save`."""
    names = {path.name for path in folder.iterdir()}
    for suffix in (SUFFIX, ".bin"):
        known = [name for end in (INDEX, "") for stem in STEMS if (name := f"{stem}{suffix}{end}") in names]
        others = sorted(name for name in names if name.endswith(f"{suffix}{INDEX}"))
        others = others or sorted(name for name in names if name.endswith(suffix))
        found = known or others
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise ConfigError(
                f"{folder} has several weights: {listed(found)}; choose one: {folder / found[0]}"
            )
    if "model_index.json" in names:
        models = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise ConfigError(
            f"{folder} is a pipeline of several models; expected the folder of one: {listed(models)}"
        )
    raise ConfigError(f"{folder} has no weights; {EXPECTED}")

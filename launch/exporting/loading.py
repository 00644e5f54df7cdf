"""How an export is loaded again: by `from_pretrained` of transformers and diffusers, or by the plain class."""

import keyword
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.exporting.files import Destination

BASES = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}
"""Libraries with `from_pretrained`, and the class that all of their models are."""
STEMS = {"diffusers": "diffusion_pytorch_model"}
"""What a library calls the file of weights in a folder, if it is not `model`."""


def library_of(model: object) -> str | None:
    """Which library's `from_pretrained` loads this model; None for a plain module. Imports none of them."""
    for base in type(model).__mro__:
        library = base.__module__.partition(".")[0]
        if BASES.get(library) == base.__name__:
            return library
    return None


def weights_stem(library: str | None) -> str:
    """Name of the file of weights in a folder, without its suffix."""
    return STEMS.get(library or "", "model")


def declared_ties(model: Any) -> Collection[str]:
    """Names that `from_pretrained` ties to others itself, and which files therefore leave out."""
    return getattr(model, "all_tied_weights_keys", None) or () if library_of(model) == "transformers" else ()


def write_config(model: Any, library: str, folder: Path, dtype: str) -> None:
    """Write what `from_pretrained` needs besides the weights.

    Args:
        model: of that library, on any device.
        library: a key of `BASES`.
        folder: to write into.
        dtype: of the exported weights, which `from_pretrained` of transformers gives the model.
    """
    if library == "diffusers":
        model.save_config(folder)
        return
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def python_lines(
    node: Mapping[str, Any],
    library: str | None,
    out: Destination,
    files: Sequence[str],
    tied: Mapping[str, str],
) -> list[str]:
    """Python that loads an export.

    Args:
        node: `model` of the configuration.
        library: from `library_of`.
        out: where the export is.
        files: names of its safetensors files.
        tied: names that were left out, each with the one that stands for it.
    """
    if out.is_folder and library:
        module, _, name = node["_target_"].rpartition(".")
        return [f"from {module} import {name}", f"model = {name}.from_pretrained({str(out)!r})"]
    imports: dict[str, list[str]] = {}
    made = f"model = {_expression(node, imports)}"
    folder = out.path if out.is_folder else out.path.parent
    paths = [str(folder / file) for file in files]
    if len(paths) == 1:
        imports["safetensors.torch"] = ["load_model"]
        return [_statement(imports), f"{made}; load_model(model, {paths[0]!r})"]
    lines = [
        _statement({**imports, "safetensors.torch": ["load_file"]}),
        made,
        f"weights = {{name: tensor for file in {paths} for name, tensor in load_file(file).items()}}",
    ]
    if tied:
        same = ", ".join(f"{name!r}: weights[{kept!r}]" for name, kept in tied.items())
        lines.append(f"weights |= {{{same}}}")
    return [*lines, "model.load_state_dict(weights)"]


def _statement(imports: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"from {module} import {', '.join(dict.fromkeys(names))}" for module, names in imports.items()
    )


def _expression(value: Any, imports: dict[str, list[str]]) -> str:
    """Python of a configured value; the classes it names are added to `imports`."""
    if isinstance(value, Mapping) and "_target_" in value:
        module, _, name = value["_target_"].rpartition(".")
        imports.setdefault(module, []).append(name)
        return (
            f"{name}({', '.join(_argument(key, value[key], imports) for key in value if key != '_target_')})"
        )
    if isinstance(value, Mapping):
        items = (f"{key!r}: {_expression(inner, imports)}" for key, inner in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_expression(inner, imports) for inner in value)}]"
    return repr(value)


def _argument(key: str, value: Any, imports: dict[str, list[str]]) -> str:
    # A stranger's configuration may name arguments that are no names: they are printed as text, not as Python.
    if key.isidentifier() and not keyword.iskeyword(key):
        return f"{key}={_expression(value, imports)}"
    return f"**{{{key!r}: {_expression(value, imports)}}}"

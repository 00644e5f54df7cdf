"""Loading of an export: the configuration for `from_pretrained`, and the Python code that the command prints."""

import inspect
import keyword
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.exporting.files import Destination

BASES = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin", "peft": "PeftModel"}
"""Libraries with `from_pretrained`, each with the base class of all its models."""
STEMS = {"diffusers": "diffusion_pytorch_model", "peft": "adapter_model"}
"""File name of the weights in a folder, without suffix, for libraries that do not use `model`."""


def library_of(model: object) -> str | None:
    """Return the library whose `from_pretrained` loads this model, or None for a plain module.

    No library is imported.
    """
    for base in type(model).__mro__:
        library = base.__module__.partition(".")[0]
        if BASES.get(library) == base.__name__:
            return library
    return None


def builds_from_config(model: object, library: str) -> bool:
    """Return whether `from_pretrained` can build the model's class, from the configuration that it finds in the folder.

    A subclass may have a constructor with arguments of its own.
    """
    constructor = type(model).__init__
    if library == "diffusers":
        return hasattr(constructor, "__wrapped__")  # its decorator `register_to_config` stores the arguments
    return list(inspect.signature(constructor).parameters)[1:2] == ["config"]


def declared_ties(model: Any) -> Collection[str]:
    """Return the tensor names that `from_pretrained` ties to other tensors, so that files need not contain them."""
    return getattr(model, "all_tied_weights_keys", None) or () if library_of(model) == "transformers" else ()


def write_config(model: Any, library: str, folder: Path, dtype: str) -> None:
    """Write the configuration files that `from_pretrained` needs in addition to the weights.

    `folder` exists, and `library` is a key of `BASES`. With `dtype`, the type of the exported weights,
    transformers loads the model.
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
    node: Mapping[str, Any] | None,
    model: object,
    out: Destination,
    files: Sequence[str],
    tied: Mapping[str, str],
) -> list[str]:
    """Return lines of Python code that load an export.

    Args:
        node: Configuration of the model, or of the base model of adapters; None leaves it to the user as `base`.
        model: Model of the export, as `node` builds it.
        out: Path of the export.
        files: Names of its safetensors files.
        tied: Tensor names that the files do not contain, each with the name under which the same tensor is stored.
    """
    imports: dict[str, list[str]] = {}
    library = library_of(model)
    built = "base" if node is None else _expression(node, imports)
    if out.is_folder and library == "peft":
        imports["peft"] = ["PeftModel"]
        return [_statement(imports), f"model = PeftModel.from_pretrained({built}, {str(out)!r})"]
    if out.is_folder and library and builds_from_config(model, library):
        name = type(model).__name__  # a class method may have built the model
        in_library = getattr(sys.modules[library], name, None) is type(model)
        module = library if in_library else type(model).__module__
        return [f"from {module} import {name}", f"model = {name}.from_pretrained({str(out)!r})"]
    made = f"model = {built}"
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


def base_node(node: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the part of a configuration that builds the base model of adapters, or None if it has no such part."""
    inner = node.get("model")
    return inner if isinstance(inner, Mapping) and "_target_" in inner else None


def _statement(imports: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(
        f"from {module} import {', '.join(dict.fromkeys(names))}" for module, names in imports.items()
    )


def _expression(value: Any, imports: dict[str, list[str]]) -> str:
    """Return the Python expression of a configured value; add the classes that it needs to `imports`."""
    if isinstance(value, Mapping) and "_target_" in value:
        module, name = _importable(value["_target_"])
        imports.setdefault(module, []).append(name.partition(".")[0])
        return (
            f"{name}({', '.join(_argument(key, value[key], imports) for key in value if key != '_target_')})"
        )
    if isinstance(value, Mapping):
        items = (f"{key!r}: {_expression(inner, imports)}" for key, inner in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_expression(inner, imports) for inner in value)}]"
    return repr(value)


def _importable(target: str) -> tuple[str, str]:
    """Return the module of a target that was imported before, and the name in it, such as `AutoModel.from_config`."""
    parts = target.split(".")
    most = len(parts) - 1
    count = next((n for n in range(most, 0, -1) if ".".join(parts[:n]) in sys.modules), most)
    return ".".join(parts[:count]), ".".join(parts[count:])


def _argument(key: str, value: Any, imports: dict[str, list[str]]) -> str:
    # In a configuration from an untrusted source, a key can be any text. It is printed as a string, not as code.
    if key.isidentifier() and not keyword.iskeyword(key):
        return f"{key}={_expression(value, imports)}"
    return f"**{{{key!r}: {_expression(value, imports)}}}"

"""The meaning of each key, for `--help`: from the docstrings of the schema and the comments of `conf/`."""

import ast
import dataclasses
import inspect
import re
import sys
from functools import cache
from importlib import resources
from itertools import pairwise

from trainer.config.text import type_of

BEGIN = "Keys, set by key=value:\n"
"""Line of the help after which the keys are listed, as YAML."""
_KEY = re.compile(r"( *)([\w-]+):(.*)")
_COMMENTED = re.compile(r"([\w-]+):.*? # (.*)")
_SENTENCE = re.compile(r".*?[.](?= [A-Z`]|$)")
LONGEST = 120
"""Largest length in characters of a meaning; of a longer one only the first sentence is shown."""
COLUMN = 34
"""Column of the terminal at which the meanings begin, counted in characters."""


def with_meanings(text: str, schema: type) -> str:
    """Return Hydra's help text with a meaning beside each key.

    The keys follow the line BEGIN. `schema` is the dataclass of the configuration, whose docstrings are the meanings.
    """
    head, begin, keys = text.partition(BEGIN)
    path: list[str] = []
    comments: dict[str, str] = {}
    lines = []
    for line in keys.splitlines(keepends=True):
        found = _KEY.match(line)
        if found is not None:
            depth = len(found[1]) // 2
            path = [*path[:depth], found[2]]
            if depth == 0:
                comments = {}
            if depth == 1 and found[2] == "_target_":
                comments = _comments(path[0], found[3].strip())
            meaning = meaning_of(schema, path) or (comments.get(found[2], "") if depth == 1 else "")
            if meaning:
                line = f"{line.rstrip():<{COLUMN}}  # {meaning}\n"
        lines.append(line)
    return head + begin + "".join(lines)


def meaning_of(schema: type, path: list[str]) -> str:
    """Return one line on a key of a dataclass; "" if the key is in none, or has no docstring."""
    *parents, name = path
    owner = type_of(schema, ".".join(parents)) if parents else schema
    if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
        return ""
    text = next((own[name] for base in owner.__mro__ if name in (own := _docstrings(base))), "")
    kind = type_of(schema, ".".join(path))
    if not text and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        text = inspect.getdoc(kind) or ""
    text = " ".join(text.split())
    found = _SENTENCE.match(text) if len(text) > LONGEST else None
    return found[0] if found else text


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass."""
    body = _classes(kind.__module__)[kind.__name__].body if dataclasses.is_dataclass(kind) else []
    found = {}
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the parsed top-level classes of a module, by name."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _comments(group: str, target: str) -> dict[str, str]:
    """Return the comment of each key in the files of a group that have this `_target_`."""
    found: dict[str, str] = {}
    folder = resources.files("conf") / group
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.name.endswith(".yaml") and f"\n_target_: {target}" in (text := file.read_text("utf-8")):
            found |= dict(_COMMENTED.findall(text))
    return found

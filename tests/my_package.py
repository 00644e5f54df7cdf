"""A package of a user, importable in the tests that import this fixture, and models made of its parts."""

import sys
import typing
from functools import partial

import pytest
from torch import nn

from tests.makers import refusal_of
from trainer.config.targets import instantiate

PACKAGE = """
import os, subprocess
from typing import Literal
from torch import nn, Tensor
from my_elsewhere import Borrowed

class Net(nn.Module):
    def __init__(self, width: int, share: float = 0.5, flag: bool = False, name: str = "n", sizes: list[int] = [1],
                 kind: Literal["a", "b"] = "a", maybe: int | None = None, other: object = None, implicit: int = None):
        super().__init__()
        if width < 0:
            raise ValueError(f"width must not be negative, got {width}")
        self.taken = dict(width=width, share=share, flag=flag, name=name, sizes=sizes, kind=kind, maybe=maybe,
                          other=other, implicit=implicit)

class Open(nn.Module):
    def __init__(self, **anything):
        super().__init__()
        self.taken = anything

class _Private(Net):
    pass

class NotAModel:
    def __init__(self, path="x"):
        open(path, "w").close()

class Config:
    def __init__(self, depth: int):
        if depth < 1:
            raise ValueError("depth must be positive")
        self.depth = depth

class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        raise {
            "bare": AssertionError(),
            "key": KeyError("n_embd"),
            "own": type("StrictError", (Exception,), {})("first line\\n" + "and more " * 100),
            "prefixed": ValueError("model: width must be even"),
            "type": TypeError("of\\n  two lines"),
        }[error]

class Pretrained(nn.Module):
    @classmethod
    def from_pretrained(cls, name: str, width: int = 3):
        return make(width)

class Child(Pretrained):
    pass

def make(width: int):
    return nn.Linear(width, 1)

def make_text(width: int = 1):
    return "text"

def rising(t, config, steps: int):
    return t / steps


def rule(t, config):
    return 0.5

not_callable = 3
"""


@pytest.fixture(autouse=True)
def my_package(tmp_path, monkeypatch):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "my_elsewhere.py").write_text("from torch import nn\nclass Borrowed(nn.Module):\n    pass\n")
    (tmp_path / "my_broken.py").write_text("import a_module_nobody_has\n")
    (tmp_path / "my_failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_package", "my_elsewhere", "my_broken", "my_failing"):
        sys.modules.pop(name, None)


def model(
    target: str, allowed: typing.Sequence[str] = ("my_package.",), **arguments: typing.Any
) -> nn.Module:
    return instantiate({"_target_": target, **arguments}, group="model", allowed=allowed)


refusal = partial(refusal_of, model)

"""Callbacks are checked when they are built, before a run directory exists."""

import pytest

from trainer.errors import ConfigError
from trainer.loop.hooks import load_callbacks


class Generator:
    def after_step(self, run):
        yield run


class Coroutine:
    async def at_end(self, run):
        pass


class NoMethod:
    def after_steps(self, run):
        pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Generator, "after_step is a generator or a coroutine, so a call would do nothing"),
        (Coroutine, "at_end is a generator or a coroutine"),
        (NoMethod, "expected an object with a method after_step"),
    ],
)
def test_a_callback_of_which_a_call_would_do_nothing_is_refused(kind, message):
    target = f"{__name__}.{kind.__name__}"
    with pytest.raises(ConfigError, match=message) as refused:
        load_callbacks({"probe": {"_target_": target}}, [f"{__name__}."])
    assert str(refused.value).startswith("callbacks.probe: ")

"""Shell completion of `polyak`: names of commands, their own keys, and Hydra's groups, files and keys."""

import importlib
import os
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from io import StringIO
from typing import get_origin

from launch.sweeps.config import BACKENDS, LaunchConfig, SweepConfig
from trainer.config.compose import drive
from trainer.config.text import type_of
from trainer.rundir.keys import AVERAGE, BEST, LIVE
from trainer.shell.commands import MODULES, SCRIPT

SHELLS = {"bash": "", "zsh": "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"}
"""Shells with a completion script, each with what must come before the part that both share."""
PRIMARY = {"train": "config", "sweep": "sweep", "plan": "config"}
"""Commands that Hydra completes, each with its primary file of `conf/`."""
WITHOUT_KEYS = {"train", "sweep", "status"}
"""Commands without keys of their own."""
LAUNCH = ("launch", *(f"launch.{field.name}" for field in fields(LaunchConfig)))
VALUES = {"launch": BACKENDS, "step": ("last", BEST), "weights": (LIVE, AVERAGE, BEST)}
"""Values of keys that Hydra does not know; names of averages follow AVERAGE."""


def script(shell: str) -> str:
    """Return the text that turns completion on, for `eval` in that shell."""
    return f"""{SHELLS[shell]}_{SCRIPT}() {{
    local IFS=$'\\n'
    export COMP_LINE COMP_POINT
    COMPREPLY=($(BREAKS="$COMP_WORDBREAKS" {SCRIPT} complete 2>/dev/null))
}}
complete -o nospace -o default -F _{SCRIPT} {SCRIPT}
"""


def complete() -> int:
    """Print the words that may follow in the line of the shell's variables COMP_LINE and COMP_POINT, one a line."""
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    _, *words = line.split(" ")
    if len(words) <= 1:
        candidates = [f"{name} " for name in [*MODULES, "completion"] if name.startswith("".join(words))]
    else:  # where there is no candidate, the shell completes file names
        candidates = _own(words[0], words[-1]) if words[0] in PRIMARY or len(words) > 2 else []
        if words[0] in PRIMARY:
            candidates += _ask_hydra(PRIMARY[words[0]], " ".join(words[1:]))
        candidates = list(dict.fromkeys(candidates))
    # bash replaces only what follows the last break, such as the = of KEY=VALUE.
    typed = words[-1] if words else ""
    fixed = max((typed.rfind(mark) + 1 for mark in os.environ.get("BREAKS", "") if mark in "=:"), default=0)
    print(*(candidate[fixed:] for candidate in candidates), sep="\n")
    return 0


def _own(name: str, typed: str) -> list[str]:
    """Return the keys of a command, as KEY=, that begin with what was typed; behind KEY= its values."""
    key, equals, _ = typed.partition("=")
    keys = (*LAUNCH, "sweep_dir") if name == "sweep" else LAUNCH if name == "retry" else ()
    if name in MODULES.keys() - WITHOUT_KEYS:
        module = importlib.import_module(MODULES[name])
        keys += (*module.KEYS, *getattr(module, "FREE", ()))
    found = (
        [f"{key}={value}" for value in VALUES.get(key, ()) if key in keys]
        if equals
        else [f"{key}=" for key in keys]
    )
    return [candidate for candidate in found if candidate.startswith(typed)]


def _ask_hydra(primary: str, line: str) -> list[str]:
    os.environ["COMP_LINE"] = f"{SCRIPT} {line}"
    os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    with redirect_stdout(answer := StringIO()), suppress(SystemExit):
        drive(["-sc", "query=bash"], primary, lambda cfg: None)
    return [_with_equals(word) for word in answer.getvalue().split()]


def _with_equals(word: str) -> str:
    """Return a completion of a list's key as KEY=; Hydra takes lists for nodes with keys of their own."""
    kind = type_of(SweepConfig, word.rstrip("."))
    return word[:-1] + "=" if word.endswith(".") and get_origin(kind) is list else word

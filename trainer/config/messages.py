"""Rewrite errors of Hydra and OmegaConf as one line that begins with the key. Imports no torch."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MissingMandatoryValue, ValidationError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from trainer.config.schema import Config
from trainer.errors import ConfigError, near
from trainer.shell.commands import command, hydra_quoted, shell_quoted

GROUPS = ("model", "task", "data", "sharding", "ema", "optimizer", "schedule", "logger", "launch")
"""Groups of which every run or sweep has a choice."""
REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""Errors that Hydra, OmegaConf and PyYAML raise for bad input."""


def refuse(error: Exception, overrides: Sequence[str] = (), source: str = "") -> NoReturn:
    """Raise a one-line ConfigError that begins with the key, in place of an error of Hydra or OmegaConf."""
    raise ConfigError(source + _explain(error, overrides)) from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = _without_details(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = list(error.options or ())
        return f"{group}: no choice {choice!r}; expected one of {', '.join(choices) or '(none exists)'}"
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"{key}: expected key=value"
        called = value.partition("(")[0]
        if called in OverridesParser.create().functions.functions and value.count("(") > value.count(")"):
            return f"{key}: the bracket after {called} is not closed; quote the whole argument"
        if value.count("[") != value.count("]") or value.count("{") != value.count("}"):
            return f"{key}: a bracket is not closed; quote the whole argument, as in '{key}=[1, 2]'"
        return f"{key}: to give this text, type {shell_quoted([f'{key}={hydra_quoted(value)}'])}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}: line {error.problem_mark.line + 1}: {error.problem}"
    sweep = re.match(
        r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)=(.*)'(?: 1\. | requires)", text
    )
    if sweep:
        key, value = sweep.groups()
        sweep_command = command("sweep", "-m", f"{key}={value}")
        return f"{key}: {value} is many values; write a list as [..], a sweep as {sweep_command}"
    if re.match(r"Could not override 'launch'", text):
        return f"launch: {command('train')} starts one run; {command('sweep')} has this key"
    twice = re.match(r"Multiple values for (\w+)\.", text)
    if twice:
        return f"{twice[1]}: has a choice already; replace it by {twice[1]}=CHOICE, without the +"
    if text.startswith("Config group override must be"):
        wrong = [
            (override.key_or_group, override.get_value_string())
            for override in OverridesParser.create().parse_overrides(list(overrides))
            if override.key_or_group in (*GROUPS, "experiment")
            and not isinstance(override.value(), str | list)
        ]
        key, value = wrong[0] if wrong else ("group", "another value")
        decay = f"; ema.decay={value} sets the decay" if key == "ema" and value[:1].isdecimal() else ""
        return f"{key}: expected the name of a choice, got {value}{decay}; --help lists the choices"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        file = re.match(r"In '(.*?)'", text)
        return _explain_key(cause, overrides) + (f" (in {file[1]}.yaml)" if file else "")
    return text


def _without_details(error: Exception) -> str:
    return re.split(r" full_key: | Config search path: ", " ".join(str(error).split()))[0]


def _explain_key(error: OmegaConfBaseException, overrides: Sequence[str]) -> str:
    key, text = str(error.full_key or error.key or "config"), _without_details(error)
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and " not in " in text:
        return not_in_schema(key, error.object_type)
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: needs a value: {key}=VALUE"
    if "does not support deletion" in text:
        return f"{key}: cannot be removed; set another value: {key}=VALUE"
    if not isinstance(error, ValidationError):
        return f"{key}: {text}"
    expected = next((name for pattern, name in EXPECTED.items() if re.search(pattern, text)), None)
    if expected is None:
        return f"{key}: {text}"
    typed = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"{key}=")]
    named = re.findall(r"^Value '(.*?)' ", text)  # as it was read: 1e3 as 1000.0; not every error has it
    received = [value for value in typed if _as_read(value) in named][:1] or typed[-1:] or named
    return f"{key}: expected {expected}" + "".join(f", got {value!r}" for value in received)


def _as_read(value: str) -> str:
    return str(OverridesParser.create().parse_override(f"key={value}").value())


def not_in_schema(key: str, node: Any) -> str:
    """Return the message for a key that the schema lacks, with the key most like it, or with all beside it.

    `node` is the dataclass that lacks the last part of the key; a sweep has nodes besides those of a run.
    """
    if key == "launch":
        return f"{key}: only {command('sweep')} has the keys of launch"
    parent = key[: key.rfind(".") + 1]
    beside = (
        [parent + field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    )
    expected = f"; expected {', '.join(beside)}" if beside else ""
    group, _, name = key.rpartition(".")
    here = ELSEWHERE.get(name) if group in ("", "trainer", "data", "optimizer") else None
    hint = f"; did you mean {here}?" if here else near(key, [*beside, *_paths(Config())])
    return f"{key}: unknown key{hint or expected}"


ELSEWHERE = {
    "batch_size": "trainer.global_batch_size",
    "epochs": "trainer.steps",
    "max_epochs": "trainer.steps",
    "num_train_epochs": "trainer.steps",
    "max_steps": "trainer.steps",
    "num_steps": "trainer.steps",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.args.weight_decay",
    "precision": "sharding.param_dtype",
    "mixed_precision": "sharding.param_dtype",
    "output_dir": "run_dir, or sweep_dir of a sweep",
    "out_dir": "run_dir, or sweep_dir of a sweep",
    "wandb": "logger=wandb",
    "workers": "trainer.num_workers",
}
"""What to type in place of the names that other trainers use, at the top or in these groups."""


EXPECTED = {
    r"Union\[int, str\]": "a number of steps or a duration such as 10min",
    "converted to Float": "a number",
    "converted to Integer": "an integer",
    "not a valid bool": "true or false",
    "converted to (String|str)": "text",
    "not a ListConfig": "a list",
    "is not Optional": "a value",
    "Cannot assign|not a subclass": "keys and values",
}


def _paths(node: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        yield path + field.name
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{path}{field.name}.")

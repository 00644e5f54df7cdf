"""Compose a configuration from a command line.

Hydra composes the files of `conf/` over the dataclasses of `trainer.config.schema`. An error of Hydra becomes one
line that names the key. Nothing here imports torch, so that `--help` and `--cfg job` answer at once. Nothing is
written: Hydra is configured to make no directory and no log. Code after `to_config` uses no OmegaConf objects.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config.help import with_meanings
from trainer.config.messages import GROUPS, REFUSED, not_in_schema, refuse
from trainer.config.schema import Config
from trainer.config.text import keep_texts, readable
from trainer.errors import ConfigError
from trainer.shell.commands import command, named_as_used

BANKS = {
    "ema.decays": "ema.decays=[]",
    "ema.averages": "ema.averages=null",
    "ema.axis": "ema.axis=0",
    "ema.axis_grows": "ema.axis_grows=false",
}
"""Keys that set several averages, each with the override that clears the key."""
T = TypeVar("T")


def _schema(kind: type[Config] = Config) -> DictConfig:
    schema = OmegaConf.structured(kind)
    _open(schema)
    return schema


def _open(node: DictConfig) -> None:
    """Let all dictionaries below a node accept any key; `targets` and `averages` check their keys later."""
    for key in node:
        child = node._get_node(key)  # a value may be missing, or an interpolation
        if isinstance(child, DictConfig):
            if OmegaConf.get_type(child) is dict:
                OmegaConf.set_struct(child, False)
            else:
                _open(child)


SCHEMA = _schema()
"""The types of every key of a run; shared, so not to be changed."""


def _register(kind: type[Config]) -> None:
    """Register the types of the primary files of `conf/` with Hydra, unless they are these already."""
    store = ConfigStore.instance()
    registered = store.repo.get("config_schema.yaml")
    if registered is not None and OmegaConf.get_type(registered.node) is kind:
        return
    # For --help Hydra copies its registry a hundred times, which takes a second. No copy is changed, so share it.
    setattr(store, "__deepcopy__", lambda memo: store)  # noqa: B010
    store.store(name="config_schema", node=SCHEMA if kind is Config else _schema(kind))


def compose(argv: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Compose the configuration of a command line; `--help`, `--cfg` and similar flags print and exit.

    Args:
        argv: arguments after the program's name.

    Returns:
        The composed configuration with unresolved interpolations, and the overrides as typed.

    Raises:
        ConfigError: Hydra or the schema refuses the command line; one line that names the key.
        SystemExit: A flag was answered (code 0) or wrong (code 2).
    """
    # `resume` is a text, so Hydra cannot have a key below it.
    argv = readable(re.sub(r"^resume\.fallback=", "resume_fallback=", one) for one in argv)
    _refuse_multirun(argv)
    return drive(argv, "config", lambda cfg: (cfg, overrides_in(argv)))


def overrides_in(argv: Sequence[str]) -> list[str]:
    """Return the arguments of a command line that are overrides: no flags, and nothing that sets a key of Hydra."""
    overrides = [a for a in argv if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    return [override for override in overrides if not override.lstrip("+~").startswith(("hydra.", "hydra/"))]


def clear_banks(overrides: Sequence[str]) -> list[str]:
    """Return the overrides; after an `ema.decay=`, add overrides that clear the banks which were not typed.

    Without them a bank of a config file would take precedence, and the typed decay would have no effect. Only functions
    that compose a configuration call this, so all other overrides in the program are as typed.
    """
    cleared = list(overrides)
    keys = [override.lstrip("+").partition("=")[0] for override in cleared]
    if "ema.decay" in keys:
        position = keys.index("ema.decay") + 1  # not at the end: flags may follow
        typed = {bank for bank in BANKS for key in keys if f"{key}.".startswith(f"{bank}.")}
        cleared[position:position] = [clear for bank, clear in BANKS.items() if bank not in typed]
    return cleared


def drive(
    argv: Sequence[str],
    config_name: str,
    task: Callable[[DictConfig], T],
    *,
    kind: type[Config] = Config,
    free: Sequence[str] = ("hydra.searchpath",),
) -> T:
    """Compose a command line with Hydra and call `task` with the result while `HydraConfig` is available.

    Args:
        argv: arguments after the program's name.
        config_name: name of the primary file of `conf/`.
        task: function that gets the composed configuration, with unresolved interpolations.
        kind: schema of the primary file.
        free: prefixes of Hydra's own keys that the user may set.

    Raises:
        ConfigError: Hydra, the schema or `task` refuses the command line; one line that names the key.
        SystemExit: As for `compose`.
    """
    _refuse_foreign(argv, free)
    _register(kind)
    # `ema.rule.KEY=` may add a key, because the rule is null or a node.
    argv = [f"++{one}" if one.startswith("ema.rule.") else one for one in clear_banks(argv)]
    argv = keep_texts(argv, kind)
    try:
        if any(argument.startswith("-") for argument in argv):
            return _by_command_line(argv, config_name, task, kind)
        with hydra.initialize_config_module("conf", version_base="1.3"):
            cfg = hydra.compose(config_name, overrides=argv, return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return task(cfg)
    except REFUSED as error:
        refuse(error, [argument for argument in argv if "=" in argument])


def _by_command_line(
    argv: Sequence[str], config_name: str, task: Callable[[DictConfig], T], kind: type[Config]
) -> T:
    """Let `hydra.main` handle `--help`, `--cfg` and the other flags. It composes twice and is slower."""
    results: list[T] = []
    refusals: list[Exception] = []

    def capture(cfg: DictConfig) -> None:
        try:
            results.append(task(cfg))
        except (*REFUSED, ConfigError) as error:  # caught here: Hydra would print its own lines
            refusals.append(error)

    program, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own message and exits with 1
    try:
        with redirect_stdout(output := StringIO()), redirect_stderr(errors := StringIO()):
            hydra.main(config_path="pkg://conf", config_name=config_name, version_base="1.3")(capture)()
    except SystemExit as leave:
        if leave.code == 2:  # argparse prints the usage of all flags, then one line with the error
            reason = errors.getvalue().strip().rpartition("error: ")[2]
            errors.truncate(0)
            raise ConfigError(f"{reason}; keys are set by KEY=VALUE, as in trainer.steps=10") from None
        raise SystemExit(2 if leave.code == 1 else leave.code) from None
    finally:
        print(named_as_used(with_meanings(output.getvalue(), kind)), end="")
        print(errors.getvalue(), end="", file=sys.stderr)
        sys.argv = program
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
    for refusal in refusals:
        raise refusal
    if not results:
        raise SystemExit(0)
    return results[-1]


def is_multirun(argument: str) -> bool:
    """Return whether an argument is Hydra's flag `--multirun`, abbreviated or not."""
    return argument == "-m" or (len(argument) > 3 and "--multirun".startswith(argument))


def _refuse_multirun(argv: Sequence[str]) -> None:
    for argument in filter(is_multirun, argv):
        sweep = command("sweep", "-m", "KEY=A,B", "launch=local")
        if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
            raise ConfigError(f"{argument}: not under torchrun; a sweep starts torchrun itself: {sweep}")
        raise ConfigError(f"{argument}: {command('train')} starts one run only; for a sweep: {sweep}")


_GROUP = rf"({'|'.join(GROUPS)})"
_WITHOUT_CHOICE = re.compile(rf"\+*{_GROUP}=(null|\[\s*\])|~{_GROUP}(=.*)?")
"""Override that leaves a group without a choice. Hydra would then use the defaults of the schema, without a word."""


def _refuse_foreign(argv: Sequence[str], free: Sequence[str]) -> None:
    for argument in argv:
        if argument.startswith("--experimental"):
            raise ConfigError(f"{argument}: not available; resume=RUN_DIR continues a run")
        if re.fullmatch(r"\+*ema\.averages=\{\s*\}", argument):
            raise ConfigError("ema.averages: {} changes nothing; ema.averages=null removes the averages")
        key = argument.lstrip("+~").split("=")[0]
        if _WITHOUT_CHOICE.fullmatch(argument):
            raise ConfigError(f"{key}: expected the name of a choice, got none; --help lists the choices")
        is_override = "=" in argument or argument.startswith("~")
        if is_override and key.startswith(("hydra.", "hydra/")) and not key.startswith(tuple(free)):
            raise ConfigError(
                f"{key}: of Hydra's keys only hydra.searchpath may be set; run_dir=PATH sets the run directory"
            )


def to_config(cfg: DictConfig) -> Config:
    """Resolve all interpolations and return the `Config`; its open nodes become dictionaries.

    Raises:
        ConfigError: A value is missing, does not resolve or has a wrong type; names the key.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        refuse_interpolations(plain)
        config = OmegaConf.to_object(cfg)
    except REFUSED as error:
        refuse(error, [])
    assert isinstance(config, Config) and isinstance(plain, dict)
    _refuse_unknown(plain, config)
    return config


def _refuse_unknown(plain: dict[Any, Any], config: Any, path: str = "") -> None:
    # `++key=` adds an unknown key to a typed node, and OmegaConf drops that key without an error.
    for key, value in plain.items():
        if key not in (field.name for field in dataclasses.fields(config)):
            raise ConfigError(not_in_schema(f"{path}{key}", config))
        if dataclasses.is_dataclass(own := getattr(config, str(key))):
            _refuse_unknown(value, own, f"{path}{key}.")


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar.

    Raises:
        ConfigError: An override cannot be parsed; names it.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except REFUSED as error:
        refuse(error, overrides)


def refuse_interpolations(node: Any, path: str = "") -> None:
    """Refuse `${...}` in the plain data of a configuration, in keys and in values.

    Raises:
        ConfigError: There is one; names its key.
    """
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{path}: a resolved configuration must not have ${{...}}, got {node!r}")
    if isinstance(node, dict):
        for key, value in node.items():
            refuse_interpolations(key, f"{path}.{key}".lstrip("."))
            refuse_interpolations(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            refuse_interpolations(value, f"{path}[{index}]")

"""From a command line to one resolved configuration, and from a frozen configuration back.

Hydra composes the files of `conf/` over the dataclasses of `trainer.config.schema`; whatever it refuses becomes one
line that names the key. Nothing here imports torch, so that `--help` and `--cfg job` answer at once, and
nothing is written: Hydra is configured to make no directory and no log. OmegaConf ends at `to_config`.

A frozen configuration may come from a stranger together with a checkpoint. `thaw` therefore gives it types
but resolves no interpolation, honours none of its `allow_targets`, and runs no code.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from trainer.config.messages import REFUSED, refuse, unknown_key
from trainer.config.schema import Config
from trainer.errors import ConfigError

BANKS = {"ema.decays": "ema.decays=[]", "ema.averages": "ema.averages=null"}
"""What keeps several averages, and the override that clears it."""
NOT_THE_SCIENCE: dict[str, Any] = {"run_dir": None, "resume": None, "allow_targets": []}
"""Keys of one invocation, frozen at these values so that equal runs have equal configurations."""
T = TypeVar("T")


def _schema(kind: type[Config] = Config) -> DictConfig:
    schema = OmegaConf.structured(kind)
    for name in kind.open_nodes:
        OmegaConf.set_struct(OmegaConf.select(schema, name), False)
    return schema


_SCHEMA = _schema()


def _register(schema: DictConfig) -> None:
    """Give the primary files of `conf/` their types."""
    store = ConfigStore.instance()
    # To list the groups for --help Hydra copies its registry a hundred times, a second in all. It never changes.
    setattr(store, "__deepcopy__", lambda memo: store)  # noqa: B010
    store.store(name="config_schema", node=schema)


def compose(argv: Sequence[str] | None = None) -> tuple[DictConfig, list[str]]:
    """Compose the configuration of a command line; `--help`, `--cfg` and their like print and leave.

    Args:
        argv: The arguments after the program's name; None takes those of this process.

    Returns:
        The composed configuration, interpolations unresolved, and the overrides as they were typed. `ema.decay=`
        asks for that one average, so what clears a bank is added to them, but for one that was typed too.

    Raises:
        ConfigError: one line that names the key, for whatever Hydra or a schema refuses.
        SystemExit: after a request for information was answered (code 0) or a flag was wrong (2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    _refuse_multirun(argv)

    def with_overrides(cfg: DictConfig) -> tuple[DictConfig, list[str]]:
        return cfg, typed_overrides("task")

    return drive(clear_banks(argv), "config", with_overrides)


def typed_overrides(kind: str) -> list[str]:
    """Inside `drive`, the overrides that Hydra was given: those of the `task`, or of `hydra` itself."""
    # Unresolved: a value may hold an interpolation.
    overrides: Any = OmegaConf.to_container(getattr(HydraConfig.get().overrides, kind), resolve=False)
    return [str(override) for override in overrides]


def clear_banks(overrides: Sequence[str]) -> list[str]:
    """The overrides, and beside an `ema.decay=` what clears the banks that were not typed too.

    A decay named beside a bank would otherwise be ignored in silence.
    """
    cleared = list(overrides)
    keys = [override.lstrip("+").partition("=")[0] for override in cleared]
    if "ema.decay" in keys:
        position = keys.index("ema.decay") + 1  # beside it: flags may follow
        typed = {bank for bank in BANKS for key in keys if f"{key}.".startswith(f"{bank}.")}
        cleared[position:position] = [clear for bank, clear in BANKS.items() if bank not in typed]
    return cleared


def without_clearing(overrides: Sequence[str]) -> list[str]:
    """Remove the overrides that `clear_banks` added, to show what the user typed; `ema.decay=` implies them."""
    has_decay = any(override.lstrip("+").startswith("ema.decay=") for override in overrides)
    return [override for override in overrides if not (has_decay and override in BANKS.values())]


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
        argv: The arguments after the program's name.
        config_name: The primary file of `conf/`.
        task: Called with the composed configuration, interpolations unresolved.
        kind: The types of the primary file.
        free: Beginnings of the keys of Hydra's own that the user may set.

    Raises:
        ConfigError: one line that names the key, for whatever Hydra, a schema or `task` refuses.
        SystemExit: as `compose`.
    """
    _refuse_foreign(argv, free)
    _register(_SCHEMA if kind is Config else _schema(kind))
    try:
        if any(argument.startswith("-") for argument in argv):
            return _by_command_line(argv, config_name, task)
        with hydra.initialize_config_module("conf", version_base="1.3"):
            cfg = hydra.compose(config_name, overrides=list(argv), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return task(cfg)
    except REFUSED as error:
        refuse(error, [argument for argument in argv if "=" in argument])


def _by_command_line(argv: Sequence[str], config_name: str, task: Callable[[DictConfig], T]) -> T:
    """Let `hydra.main` answer `--help`, `--cfg` and the other flags; it composes twice, so it is slower.

    Raises:
        SystemExit: a flag was answered (code 0) or wrong (2).
    """
    results: list[T] = []
    refusals: list[Exception] = []

    def capture(cfg: DictConfig) -> None:
        try:
            results.append(task(cfg))
        except (*REFUSED, ConfigError) as error:  # if it left here, Hydra would add a line of its own
            refusals.append(error)

    program, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [program[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints a page of its own and exits with 1
    try:
        hydra.main(config_path="pkg://conf", config_name=config_name, version_base="1.3")(capture)()
    except SystemExit as leave:
        raise SystemExit(2 if leave.code == 1 else leave.code) from None
    finally:
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
    """Whether an argument is Hydra's flag for many runs, abbreviated or not."""
    return argument == "-m" or (len(argument) > 3 and "--multirun".startswith(argument))


def _refuse_multirun(argv: Sequence[str]) -> None:
    for argument in filter(is_multirun, argv):
        sweep = "python -m launch -m KEY=A,B launch=local"
        if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
            raise ConfigError(f"{argument}: not under torchrun; a sweep starts torchrun itself: {sweep}")
        raise ConfigError(f"{argument}: python -m trainer is one run; sweep with {sweep}")


def _refuse_foreign(argv: Sequence[str], free: Sequence[str]) -> None:
    for argument in argv:
        if argument.startswith("--experimental"):
            raise ConfigError(f"{argument}: a run is carried on by resume=RUN_DIR")
        if re.fullmatch(r"\+*ema\.averages=\{\s*\}", argument):
            raise ConfigError("ema.averages: {} is merged into what is there; ema.averages=null clears it")
        key = argument.lstrip("+~").split("=")[0]
        is_override = "=" in argument or argument.startswith("~")
        if is_override and key.startswith(("hydra.", "hydra/")) and not key.startswith(tuple(free)):
            raise ConfigError(f"{key}: only hydra.searchpath is free here; a run's directory is run_dir=PATH")


def to_config(cfg: DictConfig) -> Config:
    """Resolve every interpolation and leave OmegaConf: typed groups become dataclasses, open ones dicts.

    Raises:
        ConfigError: naming the key that has no value, does not resolve or has the wrong type.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        _refuse_interpolations(plain)
        config = OmegaConf.to_object(cfg)
    except REFUSED as error:
        refuse(error, [])
    assert isinstance(config, Config) and isinstance(plain, dict)
    _refuse_unknown(plain, config)
    return config


def _refuse_unknown(plain: dict[Any, Any], config: Any, path: str = "") -> None:
    # `++key=` forces a key into a typed node, and OmegaConf leaves it out of the dataclass without a word.
    for key, value in plain.items():
        if key not in (field.name for field in dataclasses.fields(config)):
            raise ConfigError(unknown_key(f"{path}{key}"))
        if dataclasses.is_dataclass(own := getattr(config, str(key))):
            _refuse_unknown(value, own, f"{path}{key}.")


def freeze(cfg: DictConfig) -> str:
    """The resolved configuration as YAML, equal for equal science: see `NOT_THE_SCIENCE`.

    Raises:
        ConfigError: as `to_config`.
    """
    return freeze_config(to_config(cfg))


OPEN_GROUPS = ("optimizer", "schedule", "logger")
"""Typed groups in which `_target_` may name the user's own part."""


def freeze_config(config: Config) -> str:
    """Freeze a configuration that is resolved already."""
    plain = dataclasses.asdict(dataclasses.replace(config, **NOT_THE_SCIENCE))
    # Left out where unset: a run frozen before these keys existed still equals the same run frozen today.
    for group, key in (*product(OPEN_GROUPS, ["_target_"]), ("schedule", "args"), ("logger", "args")):
        if not plain[group][key]:
            del plain[group][key]
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def thaw(frozen: str) -> DictConfig:
    """A frozen configuration, typed by the schema; the text is not trusted.

    Raises:
        ConfigError: if the text is no configuration of this schema, or holds an interpolation anywhere: those
            could read the environment or call a resolver.
    """
    return _typed(_read(frozen), source="config.yaml: ")


def _read(frozen: str) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.create(frozen), resolve=False)
        _refuse_interpolations(plain)
    except REFUSED as error:
        refuse(error, source="config.yaml: ")
    if not isinstance(plain, dict):
        raise ConfigError("config.yaml: expected keys and values")
    return {str(key): value for key, value in plain.items()} | NOT_THE_SCIENCE


def _typed(plain: Mapping[str, Any], source: str = "") -> DictConfig:
    try:
        typed = OmegaConf.merge(_SCHEMA, plain)
    except REFUSED as error:
        refuse(error, source=source)
    assert isinstance(typed, DictConfig)
    OmegaConf.set_struct(typed, True)
    return typed


def resume_config(frozen: str, cfg: DictConfig, task_overrides: Sequence[str]) -> DictConfig:
    """The configuration a run is carried on with: the frozen one, except for what the user named just now.

    A group choice (`sharding=fsdp`) replaces the whole node of that group, a key only itself.

    Args:
        frozen: Text of the run's `config.yaml`, not trusted.
        cfg: What the new command line composed.
        task_overrides: The overrides of that command line.

    Raises:
        ConfigError: an override that has no meaning in a resumed run, or a frozen text that `thaw` refuses.
    """
    resumed = _read(frozen)
    # Unresolved: a chosen interpolation must read the resumed run, not the defaults around this command.
    chosen = OmegaConf.to_container(cfg, resolve=False)
    for override in parse_overrides(task_overrides):
        key = override.key_or_group
        if override.is_delete():
            raise ConfigError(f"~{key}: a resumed run cannot lose a key; set it instead: {key}=VALUE")
        if key in ("experiment", "local"):
            raise ConfigError(f"{key}: a resumed run keeps its own; name the keys that should change")
        if key == "run_dir":
            raise ConfigError("run_dir: a resumed run stays in its directory; give resume= alone")
        _copy_key(chosen, resumed, key)
    return _typed(resumed)


def _copy_key(source: Any, target: Any, key: str) -> None:
    *parents, leaf = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key)]
    for part in parents:
        source = source[part]
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[part]
    target[leaf] = source[leaf]


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides by Hydra's own grammar.

    Raises:
        ConfigError: naming the one that cannot be read.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except REFUSED as error:
        refuse(error, overrides)


def _refuse_interpolations(node: Any, path: str = "") -> None:
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{path}: a resolved configuration holds no ${{...}}, got {node!r}")
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_interpolations(key, f"{path}.{key}".lstrip("."))
            _refuse_interpolations(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _refuse_interpolations(value, f"{path}[{index}]")

"""From a command line to the configurations of its runs, frozen, without torch.

Hydra composes the files of `conf/`, and its parser reads the overrides. Hydra's own multirun composes all files twice
per combination, which takes a quarter of a second. Here each choice of groups is composed once, and values are set in
a copy of the result.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from ema.config import EMAConfig
from launch.sweeps.config import LaunchConfig, SweepConfig, check_launch, world_size
from trainer.config.compose import clear_banks, drive, is_multirun, overrides_in, to_config
from trainer.config.frozen import freeze_config
from trainer.config.messages import REFUSED, refuse
from trainer.config.own_code import TRAINED, refuse_untrusted
from trainer.config.schema import Config
from trainer.config.text import keep_texts, readable
from trainer.config.trust import trusted_targets
from trainer.config.validate import LONGEST_GROUP, reject_unused_overrides, validate
from trainer.errors import ConfigError, unknown_key
from trainer.rundir.directory import RunDir
from trainer.rundir.inherited import inherit
from trainer.shell.commands import command

FREE = ("hydra.searchpath", "hydra.sweeper.params")
VALUE = re.compile(r"[+~]*((?!hydra)\w+\.|(seed|allow_targets|run_dir|resume|fork|init_from|sweep_dir)=)")
"""Overrides that choose from no group."""
SHOWING = ("--help", "-h", "--cfg", "-c", "--info", "-i", "--hydra-help", "--package", "-p", "--resolve")
OURS = re.compile(r"[+~]*(launch|sweep_dir)\b")
"""Overrides of how runs are started; they change no run."""


@dataclass(frozen=True)
class Planned:
    """A run to be, checked as far as that goes without building it."""

    overrides: list[str]
    config: Config
    averages: dict[str, EMAConfig]
    allowed: list[str]
    """Prefixes of `_target_` that this command line trusts for it."""

    def in_group(self, group: str) -> Config:
        """Its configuration, in that wandb group unless it was given one."""
        logger = replace(self.config.logger, group=self.config.logger.group or group[:LONGEST_GROUP])
        return replace(self.config, logger=logger)

    def frozen(self, group: str) -> str:
        """Its configuration as YAML; group as for `in_group`."""
        return freeze_config(self.in_group(group))

    def make_directory(self, path: Path, group: str, git: dict[str, Any] | None) -> None:
        """Make its run directory, with the state of git in `meta.json`; group as for `in_group`."""
        meta = {"experiment": self.config.experiment, "git": git}
        RunDir.create(path, config_yaml=self.frozen(group), overrides=self.overrides, meta=meta)


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    runs: list[Planned]
    launch: LaunchConfig
    sweep_dir: str | None


def expand(argv: Sequence[str]) -> Plan:
    """All runs of a command line; `--help`, `--cfg` and their like print and leave.

    Raises:
        ConfigError: one line that names the key, of the first run that cannot be.
        SystemExit: after a request for information was answered (code 0) or a flag was wrong (2).
    """
    many = any(map(is_multirun, argv))
    arguments = readable(argument for argument in argv if not is_multirun(argument))
    typed = overrides_in(arguments)
    # A value of many is no part of what Hydra itself composes, and single values are laid over that (`_Composed`):
    # only where Hydra is asked to show a configuration must they be in it.
    bare = many and not any(argument.startswith(SHOWING) for argument in arguments)
    shared = [a for a in arguments if not (many and _is_sweep(a)) and not (bare and VALUE.match(a))]
    return drive(shared, "sweep", lambda cfg: _plan(cfg, typed, many), kind=SweepConfig, free=FREE)


def _is_sweep(argument: str) -> bool:
    if "=" not in argument or argument.startswith("-"):
        return False
    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except REFUSED:
        return False  # Hydra refuses it when it composes


def _plan(shared: DictConfig, typed: Sequence[str], many: bool) -> Plan:
    values = _values(typed) if many else {}
    combinations = [list(overrides) for overrides in product(*values.values())] if many else [list(typed)]
    if not combinations:
        raise ConfigError("-m: expected at least one combination of values, got none")
    composed = _Composed(shared)
    runs, launches = [], []
    for number, overrides in enumerate(combinations):
        where = f" [run {number} of {len(combinations)} ({' '.join(overrides)})]" if many else ""
        try:
            cfg = composed(overrides)
            whole = to_config(cfg)
            assert isinstance(whole, SweepConfig)
            check_launch(whole.launch)
            launches.append((whole.launch, whole.sweep_dir))
            runs.append(_planned(cfg, whole, [o for o in overrides if not OURS.match(o)]))
        except ConfigError as error:
            raise ConfigError(f"{error}{where}") from error
    if any(launch != launches[0] for launch in launches):
        raise ConfigError("launch: one sweep is started in one way; make a sweep of each")
    _refuse_repeats(runs, values)
    return Plan(runs, *launches[0])


def _values(typed: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides that are combined, by their key."""
    params = OmegaConf.to_container(HydraConfig.get().sweeper.get("params") or OmegaConf.create({}))
    assert isinstance(params, dict)
    arguments = [*(f"{key!s}={value}" for key, value in params.items()), *typed]
    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(arguments)
    values: dict[str, list[str]] = {}
    for override in parsed:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigError(f"{key}: expected values to try, such as {key}=1,2, got an interval")
    return values


def _refuse_repeats(runs: Sequence[Planned], values: Mapping[str, Sequence[str]]) -> None:
    """Refuse two runs of one configuration, from all combinations of `values`; the message names the repeated keys."""
    numbers: dict[str, int] = {}
    for number, run in enumerate(runs):
        same = numbers.setdefault(repr(run.config), number)
        if same < number:
            places = list(product(*(range(len(own)) for own in values.values())))
            pairs = zip(values, places[same], places[number], strict=True)
            keys = ", ".join(key for key, one, other in pairs if one != other)
            raise ConfigError(f"{keys}: expected each run once, but runs {same} and {number} are the same")


class _Composed:
    """Configurations by overrides; what shares its choices of groups is composed once."""

    def __init__(self, shared: DictConfig) -> None:
        """Begin with what Hydra has just composed."""
        self._loader = GlobalHydra.instance().config_loader()
        # Unresolved: a value may have an interpolation.
        given: Any = OmegaConf.to_container(OmegaConf.structured(HydraConfig.get().overrides), resolve=False)
        self._hydra = given["hydra"]
        self._bases = {tuple(given["task"]): shared}
        self._parser = OverridesParser.create(self._loader)
        self._parsed: dict[str, tuple[Override, bool]] = {}

    def __call__(self, overrides: Sequence[str]) -> DictConfig:
        try:
            parsed = [self._parse(override) for override in keep_texts(clear_banks(overrides), SweepConfig)]
            names = tuple(str(override.input_line) for override, is_choice in parsed if is_choice)
            if names not in self._bases:
                self._bases[names] = hydra.compose("sweep", overrides=[*self._hydra, *names])
            cfg = copy.deepcopy(self._bases[names])
            values = [override for override, is_choice in parsed if not is_choice]
            for value in values:
                apply_override(cfg, value)
        except REFUSED as error:
            refuse(error, overrides)
        return cfg

    def _parse(self, override: str) -> tuple[Override, bool]:
        """The override, and whether it chooses from a group."""
        if override not in self._parsed:
            parsed = self._parser.parse_override(override)
            self._parsed[override] = parsed, bool(self._loader.get_group_options(parsed.key_or_group))
        return self._parsed[override]


def apply_override(cfg: DictConfig, override: Override) -> None:
    """Set, add or delete one value of a composed configuration, with Hydra's meaning of `KEY=`, `+`, `++` and `~`.

    Raises:
        ConfigCompositionException: the key does not exist, or exists and is added; OmegaConf's errors for types.
    """
    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise ConfigCompositionException(f"{override.input_line}: {key!r} is not a group of configurations")
    if override.is_delete():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if node is None or name not in node:
            raise ConfigCompositionException(f"Could not delete from config. '{key}' does not exist.")
        with open_dict(cfg):
            del node[name]
    elif override.is_add() and not isinstance(value, dict | list) and OmegaConf.select(cfg, key) is not None:
        raise ConfigCompositionException(f"Could not append to config. An item is already at '{key}'.")
    elif override.is_add() or override.is_force_add():
        OmegaConf.update(cfg, key, value, merge=True, force_add=True)
    else:
        try:
            OmegaConf.update(cfg, key, value, merge=True)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise ConfigCompositionException(f"Could not override '{key}'.") from error


def _launch(cfg: DictConfig) -> LaunchConfig:
    try:
        launch = OmegaConf.to_object(cfg.launch)
    except REFUSED as error:
        refuse(error)
    assert isinstance(launch, LaunchConfig)
    names = [field.name for field in fields(launch)]
    # `++launch.key=` adds an unknown key, which OmegaConf drops without an error.
    if unknown := [str(key) for key in cfg.launch if key not in names]:
        raise ConfigError(unknown_key(f"launch.{unknown[0]}", [f"launch.{name}" for name in names]))
    check_launch(launch)
    return launch


def _planned(cfg: DictConfig, whole: SweepConfig, overrides: list[str]) -> Planned:
    if whole.resume is not None:
        raise ConfigError(
            f"resume: continue a run with {command('train', 'resume=RUN_DIR')},"
            f" a sweep with {command('retry', 'SWEEP_DIR')}"
        )
    if whole.run_dir is not None:
        raise ConfigError("run_dir: runs get theirs under the sweep's directory; name that by sweep_dir=PATH")
    config = Config(**{field.name: getattr(whole, field.name) for field in fields(Config)})
    if whole.fork is not None:
        config = to_config(inherit(cfg, overrides)[0])
    averages = validate(config, world_size(whole.launch))
    reject_unused_overrides(config, overrides)
    allowed = [*config.allow_targets, *trusted_targets(overrides)]
    refuse_untrusted(config, allowed, TRAINED)
    return Planned(overrides, config, averages, allowed)


def change_launch(launch: LaunchConfig, overrides: Sequence[str]) -> LaunchConfig:
    """The group `launch` as it is, or as `launch=NAME` chooses it, under these overrides of it.

    Raises:
        ConfigError: as `expand`.
    """
    choice = [override for override in overrides if override.startswith("launch=")]
    if choice:
        launch = drive(choice, "sweep", _launch, kind=SweepConfig)
    cfg = OmegaConf.create({"launch": OmegaConf.structured(launch)})
    try:
        values = OverridesParser.create().parse_overrides([o for o in overrides if o not in choice])
        for value in values:
            apply_override(cfg, value)
    except REFUSED as error:
        refuse(error, overrides)
    return _launch(cfg)

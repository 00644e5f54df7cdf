"""Freeze a configuration as YAML, and read frozen configurations.

A frozen configuration may come from a stranger together with a checkpoint. So `thaw` gives it types, but resolves no
interpolation, ignores its `allow_targets`, and runs no code.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.config.compose import SCHEMA, clear_banks, parse_overrides, refuse_interpolations
from trainer.config.messages import REFUSED, refuse
from trainer.config.schema import Config
from trainer.errors import ConfigError

NOT_THE_SCIENCE: dict[str, Any] = {
    "run_dir": None,
    "resume": None,
    "resume_fallback": False,
    "allow_targets": [],
    "accept_changed_records": False,
}
"""Keys that belong to one command, frozen at these values so that equal runs have equal configurations."""
NEWER_KEYS = (
    "callbacks",
    "fork",
    "init_from",
    "ema.axis",
    "ema.axis_grows",
    "ema.num_iterations",
    "ema.snapshot_dtype",
    "ema.snapshot_spacing",
    "ema.snapshots",
    "logger._target_",
    "logger.also",
    "logger.args",
    "optimizer._target_",
    "optimizer.groups",
    "schedule._target_",
    "schedule.args",
    "sharding._target_",
    "sharding.args",
    "trainer.async_save",
    "trainer.eval_policy",
    "trainer.on_checkpoint",
    "trainer.sample_grids",
)
"""Keys that came after the first release. A frozen text has none that has its default, as before the key existed."""


def freeze_config(config: Config) -> str:
    """Return a configuration as YAML; equal runs give equal text (`NOT_THE_SCIENCE`)."""
    return OmegaConf.to_yaml(OmegaConf.create(plain_config(config)))


def plain_config(config: Config) -> dict[str, Any]:
    """Return the keys and values of a configuration that its frozen text has."""
    plain = dataclasses.asdict(dataclasses.replace(config, **NOT_THE_SCIENCE))
    del plain["accept_changed_records"], plain["resume_fallback"]
    if config.init_from is None:
        del plain["init"]  # which is read with `init_from` only
    for key in NEWER_KEYS:
        *group, name = key.split(".")
        node = plain[group[0]] if group else plain
        if node[name] == OmegaConf.select(SCHEMA, key):
            del node[name]
    return plain


def thaw(frozen: str) -> DictConfig:
    """Read a frozen configuration with the types of the schema; the text is not trusted.

    Raises:
        ConfigError: The text does not fit the schema, or it has an interpolation, which could read the environment or
            call a resolver.
    """
    return _typed(_read(frozen), source="config.yaml: ")


def _read(frozen: str) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.create(frozen), resolve=False)
        refuse_interpolations(plain)
    except REFUSED as error:
        refuse(error, source="config.yaml: ")
    if not isinstance(plain, dict):
        raise ConfigError("config.yaml: expected keys and values")
    return {str(key): value for key, value in plain.items()} | NOT_THE_SCIENCE


def _typed(plain: Mapping[str, Any], source: str = "") -> DictConfig:
    try:
        typed = OmegaConf.merge(SCHEMA, plain)
    except REFUSED as error:
        refuse(error, source=source)
    assert isinstance(typed, DictConfig)
    OmegaConf.set_struct(typed, True)
    return typed


def resume_config(
    frozen: str, cfg: DictConfig, task_overrides: Sequence[str], *, key: str = "resume"
) -> DictConfig:
    """Return the configuration of a resumed or forked run: the frozen one, changed by the overrides of this command.

    A group choice (`sharding=fsdp`) replaces the whole node of the group. An override of a key replaces that key only.

    Args:
        frozen: text of the run's `config.yaml`, not trusted.
        cfg: configuration composed from the new command line.
        task_overrides: overrides of the new command line.
        key: `resume`, or `fork` for a new run. A new run may have its own `run_dir` and forgets how the other began.

    Raises:
        ConfigError: An override is not possible in such a run, or `thaw` refuses the frozen text.
    """
    resumed = _read(frozen)
    if key == "fork":
        resumed = {name: value for name, value in resumed.items() if name not in ("init_from", "init")}
    # Unresolved: an interpolation must use the values of the resumed run, not the defaults composed here.
    chosen = OmegaConf.to_container(cfg, resolve=False)
    for override in parse_overrides(clear_banks(task_overrides)):
        name = override.key_or_group
        if override.is_delete():
            raise ConfigError(f"~{name}: {key}= cannot remove a key; set it instead: {name}=VALUE")
        if name in ("experiment", "local"):
            raise ConfigError(f"{name}: {key}= keeps the {name} of the run; override single keys instead")
        if name == "run_dir" and key == "resume":
            raise ConfigError(
                "run_dir: cannot be combined with resume=, which names the run directory already"
            )
        _copy_key(chosen, resumed, name)
    return _typed(resumed)


def _copy_key(source: Any, target: Any, key: str) -> None:
    *parents, leaf = [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key)]
    for part in parents:
        source = source[part]
        if isinstance(target, dict) and not isinstance(target.get(part), dict | list):
            target[part] = {}
        target = target[part]
    target[leaf] = source[leaf]

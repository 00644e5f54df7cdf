"""Advice for sweeps that vary only the averages: one run with a bank of averages gives the same results."""

import dataclasses
from collections.abc import Sequence

from ema.config import EMAConfig
from launch.sweeps.backends.base import launcher
from launch.sweeps.config import LaunchConfig
from launch.sweeps.expand import Planned
from trainer.config.averages import BANK_RULES
from trainer.config.schema import Config
from trainer.shell.commands import composition_flags, typed_form

FIELDS = [field.name for field in dataclasses.fields(EMAConfig)]
"""Settings of one average."""


def one_run_instead(runs: Sequence[Planned], launch: LaunchConfig) -> str | None:
    """Return the command of a single run with the averages of all runs, or None if no such run exists.

    Such a run exists if each run has one average and the runs differ only in the settings of this average. If only
    `ema.decay` differs, the command sets `ema.decays`; otherwise it names each average in `ema.averages`.
    """
    if len(runs) < 2 or any(len(run.averages) != 1 for run in runs):
        return None
    if any(_without_averages(run.config) != _without_averages(runs[0].config) for run in runs[1:]):
        return None
    groups = [run.config.ema for run in runs]
    first = groups[0]
    differing = [
        name for name in FIELDS if any(getattr(group, name) != getattr(first, name) for group in groups)
    ]
    shared = set.intersection(*(set(run.overrides) for run in runs))
    common = [override for override in runs[0].overrides if override in shared]
    if differing == ["decay"] and first.type in BANK_RULES:
        chosen = (
            any(key_of(override) in ("ema", "ema.type") for override in common) or first.type != "constant"
        )
        decays = ",".join(repr(group.decay) for group in groups)
        bank = [*([] if chosen else ["ema=bank"]), f"ema.decays=[{decays}]"]
    else:
        names = [_word(next(iter(run.averages)), run.config.ema.type) for run in runs]
        names = [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]
        named = (f"{name}:{{{_fields(group, differing)}}}" for name, group in zip(names, groups, strict=True))
        bank = ["ema.decays=[]", f"ema.averages={{{','.join(named)}}}"]
    return typed_form([*launcher(launch), "-m", "trainer", *composition_flags(), *common, *bank])


def _without_averages(config: Config) -> Config:
    """Return the configuration with neutral settings of the average, to compare everything else."""
    group = dataclasses.replace(config.ema, **dataclasses.asdict(EMAConfig()), decays=[], averages=None)
    return dataclasses.replace(config, ema=group)


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.lstrip("+~").partition("=")[0]


def _word(name: str, kind: str) -> str:
    """Return a name for an average that YAML cannot parse as a number."""
    return name if name[0].isalpha() else f"{kind}_{name}"


def _fields(ema: EMAConfig, names: Sequence[str]) -> str:
    return ",".join(f"{name}:{_value(getattr(ema, name))}" for name in names)


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

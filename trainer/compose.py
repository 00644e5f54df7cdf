"""From a command line to one resolved configuration, and from a frozen configuration back.

Hydra composes the files of `conf/` over the dataclasses of `trainer.config`; whatever it refuses becomes one
line that names the key. Nothing here imports torch, so that `--help` and `--cfg job` answer at once, and
nothing is written: Hydra is told to make no directory and no log. OmegaConf ends at `to_config`.

A frozen configuration may come from a stranger together with a checkpoint. `thaw` therefore gives it types
but resolves no interpolation, honours none of its `allow_targets`, and runs no code.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf, ValidationError
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from trainer.config import Config, ConfigError

OPEN_NODES = ("model", "task", "data", "metrics", "optimizer.args", "ema.averages")
"""Nodes that take any key: what they build or `trainer.validate` knows which ones there are."""
BANKS = {"ema.decays": "ema.decays=[]", "ema.averages": "ema.averages=null"}
"""What keeps several averages, and the override that clears it."""
NOT_THE_SCIENCE: dict[str, Any] = {"run_dir": None, "resume": None, "allow_targets": []}
"""Keys of one invocation, frozen at these values so that equal runs have equal configurations."""
T = TypeVar("T")
REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


def _schema(kind: type[Config] = Config) -> DictConfig:
    schema = OmegaConf.structured(kind)
    for name in OPEN_NODES:
        OmegaConf.set_struct(OmegaConf.select(schema, name), False)
    return schema


_SCHEMA = _schema()


def _register(schema: DictConfig) -> None:
    """Give the primary files of `conf/` their types."""
    store = ConfigStore.instance()
    # To list the groups for --help Hydra copies its registry a hundred times, a second in all. Nobody changes it.
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


def drive(
    argv: Sequence[str],
    config_name: str,
    task: Callable[[DictConfig], T],
    *,
    kind: type[Config] = Config,
    free: Sequence[str] = ("hydra.searchpath",),
) -> T:
    """Let Hydra read a command line, and hand what it composed to `task` while Hydra is still there to be asked.

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
        for refusal in refusals:
            raise refusal
    except REFUSED as error:
        refuse(error, [argument for argument in argv if "=" in argument])
    except SystemExit as leave:
        raise SystemExit(2 if leave.code == 1 else leave.code) from None
    finally:
        sys.argv = program
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
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
        config = OmegaConf.to_object(OmegaConf.merge(_SCHEMA, plain))
    except REFUSED as error:
        refuse(error, [])
    assert isinstance(config, Config)
    return config


def freeze(cfg: DictConfig) -> str:
    """The resolved configuration as YAML, equal for equal science: see `NOT_THE_SCIENCE`.

    Raises:
        ConfigError: as `to_config`.
    """
    return freeze_config(to_config(cfg))


def freeze_config(config: Config) -> str:
    """`freeze` of what is resolved already."""
    config = dataclasses.replace(config, **NOT_THE_SCIENCE)
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


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


def resume_config(
    frozen: str, cfg: DictConfig, task_overrides: Sequence[str]
) -> tuple[DictConfig, list[str]]:
    """The configuration a run is carried on with: the frozen one, except for what the user named just now.

    A group choice (`sharding=fsdp`) replaces the whole node of that group, a key only itself.

    Args:
        frozen: Text of the run's `config.yaml`, not trusted.
        cfg: What the new command line composed.
        task_overrides: The overrides of that command line.

    Returns:
        The configuration and the names of the keys that the user changed, in the order they were typed.

    Raises:
        ConfigError: an override that has no meaning in a resumed run, or a frozen text that `thaw` refuses.
    """
    resumed = _read(frozen)
    # Unresolved: a chosen interpolation must read the resumed run, not the defaults around this command.
    chosen = OmegaConf.to_container(cfg, resolve=False)
    changed: list[str] = []
    for override in parse_overrides(task_overrides):
        key = override.key_or_group
        if override.is_delete():
            raise ConfigError(f"~{key}: a resumed run cannot lose a key; set it instead: {key}=VALUE")
        if key in ("experiment", "local"):
            raise ConfigError(f"{key}: a resumed run keeps its own; name the keys that should change")
        if key == "run_dir":
            raise ConfigError("run_dir: a resumed run stays in its directory; give resume= alone")
        _copy_key(chosen, resumed, key)
        if key not in NOT_THE_SCIENCE:
            changed.append(key)
    return _typed(resumed), list(dict.fromkeys(changed))


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


def refuse(error: Exception, overrides: Sequence[str] = (), source: str = "") -> NoReturn:
    """Say in one line, beginning with the key, what Hydra or OmegaConf said in many."""
    raise ConfigError(source + _explain(error, overrides)) from error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = _one_line(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = list(error.options or ())
        return f"{group}: no choice {choice!r}; expected one of {', '.join(choices) or '(there is none)'}"
    if isinstance(error, OverrideParseException):
        expected = "quote what is not plain: key='...'" if "=" in error.override else "expected key=value"
        return f"{error.override}: {expected}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}: line {error.problem_mark.line + 1}: {error.problem}"
    sweep = re.match(
        r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)=(.*)'(?: 1\. | requires)", text
    )
    if sweep:
        key, value = sweep.groups()
        return f"{key}: {value} is many values; a list is [..], a sweep is python -m launch -m {key}={value}"
    twice = re.match(r"Multiple values for (\w+)\.", text)
    if twice:
        return f"{twice[1]}: has a choice already; replace it: {twice[1]}=CHOICE, without the +"
    if text.startswith("Config group override must be"):
        wrong = [o.key_or_group for o in parse_overrides(overrides) if not isinstance(o.value(), str | list)]
        return f"{next((key for key in wrong if '.' not in key), 'group')}: expected the name of a choice"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        file = re.match(r"In '(.*?)'", text)
        return _explain_key(cause, overrides) + (f" (in {file[1]}.yaml)" if file else "")
    return text


def _one_line(error: Exception) -> str:
    return re.split(r" full_key: | Config search path: ", " ".join(str(error).split()))[0]


def _explain_key(error: OmegaConfBaseException, overrides: Sequence[str]) -> str:
    key, text = str(error.full_key or error.key or "config"), _one_line(error)
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and " not in " in text:
        known = list(_paths(Config()))
        near = [path for path in known if path.rpartition(".")[2] == key.rpartition(".")[2]]
        near = near or difflib.get_close_matches(key, known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if isinstance(error, MissingMandatoryValue):
        return f"{key}: needs a value: {key}=VALUE"
    if not isinstance(error, ValidationError):
        return f"{key}: {text}"
    expected = next((name for pattern, name in EXPECTED.items() if re.search(pattern, text)), None)
    if expected is None:
        return f"{key}: {text}"
    typed = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith(f"{key}=")]
    received = typed[-1:] or re.findall(r"^Value '(.*?)' ", text)
    return f"{key}: expected {expected}" + "".join(f", got {value!r}" for value in received)


EXPECTED = {
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

"""Which tensor of a source each tensor of a model gets: names, shapes, and what may be missing."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from ema.state import own_names
from trainer.config.renames import Renames, parse_renames, renamed
from trainer.config.schema import InitConfig
from trainer.errors import ConfigError, listed
from trainer.weights.source import KEY, is_lossy


def match(
    wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor], aliases: Collection[str], init: InitConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Find the tensor of a source for each tensor of a model.

    Names of the source are changed by `init.rename`; components of wrappers (`module.`, `_orig_mod.`) do not count.
    A tied tensor of the model may be in the source under any of its names.

    Args:
        wanted: tensors of the model by name; a tied tensor has several names.
        stored: meta tensors of the source by name.
        aliases: second names among `stored`, which the model need not have.
        init: what may be renamed, missing and unexpected.

    Returns:
        The tensor of the model by name in the source, of equal shapes. The same for further names in the source of tied
        tensors, which must have the same values. Notes on tensors that are not loaded, and on casts that change values.

    Raises:
        ConfigError: A name is missing, unexpected or ambiguous, or a shape or a kind of number differs.
    """
    renames = parse_renames(init.rename)
    groups: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        groups.setdefault(id(tensor), []).append(name)
    tied = [(names, wanted[names[0]]) for names in groups.values()]
    pairs, checks, missing = _paired(tied, stored, aliases, _source_names(wanted, stored, renames), init)
    ignored = [name for name in stored if name not in pairs and name not in checks and name not in aliases]
    unexpected = [
        name if (new := renamed(name, renames)) == name else f"{name} (renamed {new})"
        for name in ignored
        if not _matches(name, init.unexpected)
    ]
    _refuse(missing, unexpected)
    if not pairs:
        raise ConfigError(f"{KEY}: no tensor of the source has the name of one of the model")
    notes = _casts({name: (stored[name], tensor) for name, tensor in pairs.items()})
    kept = len(groups) - len(pairs)
    if kept or ignored:
        notes.append(
            f"{KEY}: {kept} of {len(groups)} tensors of the model keep their initial weights,"
            f" and {len(ignored)} of the source are ignored"
        )
    return pairs, checks, notes


def _paired(
    tied: Sequence[tuple[Sequence[str], Tensor]],
    stored: Mapping[str, Tensor],
    aliases: Collection[str],
    source_of: Mapping[str, str],
    init: InitConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return the first two results of `match`, and the names that the source lacks and may not lack.

    Raises:
        ConfigError: A shape differs.
    """
    pairs: dict[str, Tensor] = {}
    checks: dict[str, Tensor] = {}
    missing: list[str] = []
    misfits: list[str] = []
    for names, tensor in tied:
        found = [source_of[name] for name in names if name in source_of]
        found = [name for name in found if name not in aliases] or found[:1]
        fits = [name for name in found if stored[name].shape == tensor.shape]
        may_miss = all(_matches(name, init.missing) for name in names)
        if fits:
            pairs[fits[0]] = tensor
            checks |= {name: tensor for name in fits[1:]}
        elif not found and not may_miss:
            missing.append(names[0])
        elif found and not (may_miss and all(_matches(name, init.unexpected) for name in found)):
            both = names[0] if found[0] == names[0] else f"{found[0]} (for {names[0]})"
            shapes = tuple(stored[found[0]].shape), tuple(tensor.shape)
            misfits.append(f"{both} has shape {shapes[0]}, and the model has {shapes[1]}")
    if misfits:
        raise ConfigError(
            f"{KEY}: {listed(misfits, 1)}; change the model, or list the name in init.missing and in"
            " init.unexpected to keep its initial weights"
        )
    return pairs, checks, missing


def _source_names(wanted: Collection[str], stored: Collection[str], renames: Renames) -> dict[str, str]:
    """Return the name in the source of each tensor of the model that the source has."""
    after: dict[str, str] = {}
    for name in stored:
        new = renamed(name, renames)
        if new in after:
            raise ConfigError(f"init.rename: {after[new]} and {name} of the source both become {new}")
        after[new] = name
    source_of: dict[str, str] = {}
    for key, name in own_names(after, wanted).items():
        if name not in wanted:
            name = _adapter_name(name)
        if name not in wanted:
            continue
        if name in source_of:
            raise ConfigError(f"{KEY}: {source_of[name]} and {after[key]} of the source both mean {name}")
        source_of[name] = after[key]
    return source_of


def _adapter_name(name: str) -> str:
    """Return the name that a peft model gives to a tensor of an adapter's file, which lacks the adapter's name."""
    head, dot, last = name.rpartition(".")
    kind = head.rpartition(".")[2]
    return f"{head}.default{dot}{last}" if kind.startswith("lora_") else f"{name}.default"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuse missing and unexpected names; if there are both, a renaming may be the cause."""
    if missing:
        beside = f"; the source has {listed(unexpected, 1)} instead" if unexpected else ""
        raise ConfigError(
            f"{KEY}: the source has no {listed(missing, 1)}{beside}; "
            + ("rename it by init.rename, or " if unexpected else "")
            + "keep initial weights by init.missing=[PATTERN]"
        )
    if unexpected:
        raise ConfigError(
            f"{KEY}: the model has no {listed(unexpected, 1)}, which the source has;"
            " ignore it by init.unexpected=[PATTERN]"
        )


def _casts(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Return a note for each cast that can change values; refuse casts between kinds of numbers."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, (stored, tensor) in pairs.items():
        if stored.dtype == tensor.dtype:
            continue
        kinds = [str(one.dtype).removeprefix("torch.") for one in (stored, tensor)]
        if not (stored.is_floating_point() and tensor.is_floating_point()):
            raise ConfigError(f"{KEY}: {name} is {kinds[0]}, and the model has {kinds[1]}")
        if is_lossy(stored.dtype, tensor.dtype):
            counts[kinds[0], kinds[1]] += 1
    return [
        f"{KEY}: {count} tensors are rounded from {stored} to the model's {kept}"
        for (stored, kept), count in counts.items()
    ]

"""Load the weights of `init_from` into a model, whole or sharded, before its optimizer and averages are made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.config.schema import InitConfig
from trainer.distributed.processes import agreeing
from trainer.errors import ConfigError
from trainer.weights.matching import match
from trainer.weights.opening import open_source
from trainer.weights.source import KEY, Origin, Source, own_part, sha256_of_files


def start_from(text: str, init: InitConfig, model: nn.Module) -> Origin:
    """Load the weights that `init_from` names into a model on its device, whole or sharded by FSDP2, in place.

    Each rank reads its own part of each tensor.

    Raises:
        ConfigError: The source cannot be read, does not fit the model, or is not finite; raised on every rank.

    Collectives: object all-gathers, and for a checkpoint those of DCP.
    """
    with agreeing("opening the weights to start from", collectives=True), _blamed():
        source = open_source(text)
    # With the parameters themselves, not copies, tied names are found by identity.
    state = model.state_dict(keep_vars=True)
    wanted = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    with agreeing("matching the weights to start from"):
        pairs, checks, notes = match(wanted, source.tensors, source.aliases, init)
    with agreeing("loading the weights to start from", collectives=True), _blamed(), torch.no_grad():
        source.read_into({name: tensor.detach() for name, tensor in pairs.items()})
        _check_same(source, checks)
        _check_finite(source, pairs)
    # The values are in place already; this call runs the model's own loading hooks.
    model.load_state_dict({**state, **{name: tensor.detach() for name, tensor in wanted.items()}})
    with _blamed():
        return Origin(_facts(text, source), [*source.notes, *notes])


@contextmanager
def _blamed() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        if str(error).startswith(f"{KEY}:"):
            raise
        raise ConfigError(f"{KEY}: {error}") from error


def _check_same(source: Source, checks: Mapping[str, Tensor]) -> None:
    """Refuse a source with different values under the names of one tied tensor of the model."""
    for name, tensor in checks.items():
        again = torch.empty_like(tensor.detach())
        source.read_into({name: again})
        if not torch.equal(own_part(again)[0], own_part(tensor.detach())[0]):
            raise ConfigError(
                f"{KEY}: {name} of the source differs from another tensor that the model ties it to;"
                " rename it by init.rename and list the new name in init.unexpected"
            )


def _check_finite(source: Source, loaded: Mapping[str, Tensor]) -> None:
    """Refuse a source that was saved after a run diverged; what is not trained may have infinities, as masks do."""
    for name, tensor in loaded.items():
        own = own_part(tensor.detach())[0]
        wrong = ~own.isfinite() if tensor.requires_grad else own.isnan()
        if wrong.any():
            raise ConfigError(
                f"{KEY}: {source.path}: {name} has values that are not finite; choose weights from before the run"
                " diverged"
            )


def _facts(text: str, source: Source) -> dict[str, object]:
    path = source.path.absolute()
    return {
        "source": text,
        "path": str(path),
        "kind": source.kind,
        **source.facts,
        "sha256": sha256_of_files(source.files, path if path.is_dir() else path.parent),
    }

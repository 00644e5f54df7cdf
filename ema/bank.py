"""Several averages of one model, which read its live weights together."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ema.average import ExponentialMovingAverage
from ema.config import EMAConfig
from ema.memory import like, local
from ema.rules import Rule
from ema.shards import part_for
from ema.track import Track
from ema.update import update_together
from ema.walk import Walk


class EMABank(Mapping[str, ExponentialMovingAverage]):
    """Averages of one model by name, each with its own rule, dtype and start.

    Common work is done once for all: walking over the model, casting the live weights, and gathering sharded weights in
    mode `full_tensor`. A bank may be empty; then it does nothing.

    Args:
        model: the live model, as for `ExponentialMovingAverage`.
        configs: config of each average by its name. A name must not be empty or contain "/".
        rules: the callable of `config.rule` by name of the average.

    Its attribute `walk` is for the other modules of `ema`.

    Raises:
        ValueError: A name is not allowed, or `ExponentialMovingAverage` refuses the config.
    """

    def __init__(
        self, model: nn.Module, configs: Mapping[str, EMAConfig], *, rules: Mapping[str, Rule] | None = None
    ) -> None:
        rules = rules or {}
        for name in [*configs, *rules]:
            _check_name(name)
            if name not in configs:
                raise ValueError(f"EMABank: expected rules for averages of the bank, got one for {name!r}")
        self.walk = Walk(model)
        self._averages = {
            name: ExponentialMovingAverage.of(Track(self.walk, config, rules.get(name)))
            for name, config in configs.items()
        }

    def __repr__(self) -> str:
        return f"EMABank({self._averages!r})"

    def __getitem__(self, name: str) -> ExponentialMovingAverage:
        if name not in self._averages:
            raise KeyError(f"EMABank: expected one of {list(self)}, got {name!r}")
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    def add(self, model: nn.Module, name: str, config: EMAConfig) -> ExponentialMovingAverage:
        """Add an average with a built-in rule to the bank and return it; it starts at its first update.

        Args:
            model: the live model, wrapped or not.
            name: a name that the bank does not have yet, as for the constructor.
            config: its settings.

        Memory and collectives: those of making an average.

        Raises:
            ValueError: The name is not allowed or taken, or `ExponentialMovingAverage` refuses the config.
            KeyError: The model has other parameters than the averages.
            RuntimeError: An average is swapped into the model.
        """
        _check_name(name)
        if name in self._averages:
            raise ValueError(f"EMABank: expected a new name, got {name!r} of the bank {list(self)}")
        walk = self.walk
        with walk.kept_on_error():
            walk.follow(model, "add an average")
            for average in self._averages.values():
                average.track.fit()
            added = ExponentialMovingAverage.of(Track(walk, config, None))
        self._averages[name] = added
        return added

    def update(self, model: nn.Module, *, iteration: int, finite: bool | Tensor = True) -> None:
        """Update every average with the live weights; arguments, collectives and errors as for one average."""
        if self._averages:
            tracks = [average.track for average in self._averages.values()]
            update_together(self.walk, tracks, model, iteration, finite)

    @torch.no_grad()
    def combined(
        self, model: nn.Module, coefficients: Mapping[str, float], live: float = 0.0
    ) -> dict[str, Tensor]:
        """Return a weighted sum of averages and of the live weights, over the tensors that they average.

        Args:
            model: the live model, wrapped or not.
            coefficients: coefficient of each average by name, at least one; they must average the same tensors.
            live: coefficient of the live weights.

        Returns:
            Tensors by canonical name for `ema.swap.weights_swapped_into`, in float32 or wider, sharded as the model.

        Memory: one copy of this rank's part. Collectives: none; the host waits for updates in the background.

        Raises:
            KeyError: A name is not in the bank, or the model has other parameters than the averages.
            ValueError: The averages average different tensors, one has not started, or the model does not fit.
            RuntimeError: An average is swapped into the model.
        """
        tracks = {name: self[name].track for name in coefficients}
        covered = {(*track.coverage.averaged, *track.coverage.averaged_buffers) for track in tracks.values()}
        if len(covered) != 1 or not all(track.started for track in tracks.values()):
            raise ValueError(f"expected averages of the same tensors that have started, got {list(tracks)}")
        walk = self.walk
        walk.background.wait()
        with walk.kept_on_error():
            walk.follow(model, "combine averages")
            for track in tracks.values():
                track.fit()
                track.refuse_torn()
        sums = {}
        for name in covered.pop():
            tensor = walk.by_name[name].tensor.detach()
            total = like(tensor, torch.promote_types(tensor.dtype, torch.float32), local(tensor).device)
            part = local(total)
            if live:
                part.copy_(local(tensor)).mul_(live)
            else:
                part.zero_()  # live weights that are not finite take no part either
            for average, track in tracks.items():
                value = part_for(tensor, track.shadows[name])
                part.add_(value.to(part.device, part.dtype), alpha=coefficients[average])
            sums[name] = total
        return sums

    def state_dict(self, *, snapshot: bool = False) -> dict[str, Tensor]:
        """Return all averages in one flat dict with keys `<name>/<key of its state_dict>`. No collective."""
        return {
            f"{name}/{key}": tensor
            for name, average in self.items()
            for key, tensor in average.state_dict(snapshot=snapshot).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved bank. All names must match, and a load that fails changes no average.

        Collectives: as for one average; all ranks must call this.

        Raises:
            KeyError, ValueError, RuntimeError: as for one average, with its name.
        """
        parts: dict[str, dict[str, Any]] = {name: {} for name in self}
        for key, value in state.items():
            name, slash, rest = key.partition("/")
            if not slash or name not in parts:
                raise KeyError(f"the state has unexpected {key!r}: the bank holds {list(self)}")
            parts[name][rest] = value
        checked = {}
        for name, average in self.items():
            try:
                checked[name] = average.track.check(parts[name])
            except (KeyError, ValueError) as error:
                raise type(error)(f"average {name!r}: {error.args[0]}") from error
        for name, average in self.items():
            average.track.load(checked[name])


def _check_name(name: str) -> None:
    if not name or "/" in name:
        raise ValueError(f"EMABank: expected a name without '/', got {name!r}")

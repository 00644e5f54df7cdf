"""Several averages of one model, which read its live weights together."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ema.average import ExponentialMovingAverage
from ema.config import EMAConfig
from ema.rules import Rule
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
            if not name or "/" in name:
                raise ValueError(f"EMABank: expected a name without '/', got {name!r}")
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
        return self._averages[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    def update(self, model: nn.Module, *, iteration: int, finite: bool | Tensor = True) -> None:
        """Update every average with the live weights; arguments, collectives and errors as for one average."""
        if self._averages:
            tracks = [average.track for average in self._averages.values()]
            update_together(self.walk, tracks, model, iteration, finite)

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

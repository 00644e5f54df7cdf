"""Compare averages with a naive reference, bit for bit, on many published architectures with random weights.

    python -m tests.zoo [--limit 100]

A family whose package is not installed is skipped with a line. Each failure is one line, and the last line counts.
"""

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ema import EMAConfig, ExponentialMovingAverage

Maker = tuple[str, Callable[[], nn.Module]]

TINY = {
    "hidden_size": 16,
    "d_model": 16,
    "n_embd": 16,
    "dim": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_head": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 2,
    "num_local_experts": 2,
}
"""Settings that make a configuration of transformers small, where it has them."""
MOST = 20_000_000
"""Parameters of the largest model that is built."""


def of_torch() -> Iterator[Maker]:
    """Yield layers of torch itself, which no package is needed for."""
    yield "LSTM", lambda: nn.LSTM(4, 5, 2, bidirectional=True)
    yield "GRU", lambda: nn.GRU(4, 5)
    yield "Transformer", lambda: nn.Transformer(8, 2, 1, 1, 16)
    yield "InstanceNorm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.BatchNorm2d(4))
    yield "EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(7, 3), nn.Bilinear(3, 3, 2))


def of_transformers() -> Iterator[Maker]:
    """Yield a tiny model of each model type of transformers."""
    auto = import_module("transformers.models.auto.modeling_auto")
    configurations = import_module("transformers").AutoConfig
    for kind in sorted(auto.MODEL_MAPPING_NAMES):
        yield kind, lambda kind=kind: _tiny(configurations, kind)


def _tiny(configurations: Any, kind: str) -> nn.Module:
    config = configurations.for_model(kind)
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        for name, value in TINY.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, value)
    model: nn.Module = import_module("transformers").AutoModel.from_config(config)
    return model


def of_timm() -> Iterator[Maker]:
    """Yield the first model of each family of timm."""
    timm = import_module("timm")
    for family in timm.list_modules():
        name = next(iter(timm.list_models(module=family)), None)
        if name is not None:
            yield name, lambda name=name: timm.create_model(name, pretrained=False)


def of_diffusers() -> Iterator[Maker]:
    """Yield the models of diffusers that can be made without arguments."""
    diffusers = import_module("diffusers")
    for name in sorted(vars(import_module("diffusers.models"))["_import_structure"].get("autoencoders", [])):
        yield name, lambda name=name: getattr(diffusers, name)()
    for name in ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"):
        yield name, lambda name=name: getattr(diffusers, name)()


FAMILIES = {
    "torch": of_torch,
    "transformers": of_transformers,
    "timm": of_timm,
    "diffusers": of_diffusers,
}


def check(model: nn.Module) -> str | None:
    """Return what differs from the naive reference first, None if nothing does."""
    target = copy.deepcopy(model)
    average = ExponentialMovingAverage(model, EMAConfig(decay=0.5, dtype=None))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    expected: dict[str, Tensor] = {}
    for iteration in range(3):
        _step(model)
        average.update(model, iteration=iteration)
        for name, value in model.state_dict(keep_vars=True).items():
            old = expected.get(name)
            averaged = id(value) in trained and old is not None
            expected[name] = old.lerp(value.detach(), 0.5) if averaged else value.detach().clone()  # type: ignore[union-attr]
    _step(model)
    live = {name: value.detach().clone() for name, value in model.state_dict().items()}
    frozen = {n: live[n] for n, p in model.state_dict(keep_vars=True).items() if _is_frozen(p)}
    published = expected | frozen
    with average.swapped_into(model):
        inside = _difference(dict(model.state_dict()), published)
    average.copy_to(target)
    again = ExponentialMovingAverage(copy.deepcopy(model), EMAConfig(decay=0.5, dtype=None))
    again.load_state_dict(average.state_dict(snapshot=True))
    found = {
        "inside the swap": inside,
        "after the swap": _difference(dict(model.state_dict()), live),
        "copy_to": _difference(dict(target.state_dict()), published),
        "state": _difference(again.state_dict(), average.state_dict()),
    }
    return next((f"{where}: {name}" for where, name in found.items() if name is not None), None)


def _is_frozen(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


@torch.no_grad()
def _step(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point() and not buffer.is_inference():
            buffer.copy_(torch.rand(buffer.shape))


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    if found.keys() != expected.keys():
        return f"names {sorted(found.keys() ^ expected.keys())[:3]}"
    return next((name for name in expected if not torch.equal(found[name], expected[name])), None)


def main() -> None:
    """Check all families and print failures and counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--limit", type=int, default=100, help="most models of one family")
    limit = parser.parse_args().limit
    warnings.simplefilter("ignore")
    counts = {"right": 0, "wrong": 0, "not built": 0}
    for family, makers in FAMILIES.items():
        try:
            import_module(family)
        except ImportError:
            print(f"{family}: skipped, it is not installed")
            continue
        for name, make in itertools.islice(makers(), limit):
            counts[_outcome(f"{family} {name}", make)] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


def _outcome(name: str, make: Callable[[], nn.Module]) -> str:
    torch.manual_seed(0)
    try:
        with torch.device("meta"):  # most models are too large by default, even to build them once
            size = sum(parameter.numel() for parameter in make().parameters())
        model = make() if size <= MOST else None
    except Exception as error:
        # Many configurations cannot be made tiny in this way, each with an error of its own.
        print(f"{name}: not built: {type(error).__name__}: {str(error).splitlines()[:1]}")
        return "not built"
    if model is None:
        print(f"{name}: not built: {size} parameters, more than {MOST}")
        return "not built"
    try:
        wrong = check(model)
    except (KeyError, ValueError, RuntimeError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        print(f"{name}: {wrong}")
    return "right" if wrong is None else "wrong"


if __name__ == "__main__":
    main()

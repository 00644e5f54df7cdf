"""A model whose constructor loads weights keeps them; a model that only `init_weights` initialises gets its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from launch.planning.rehearsal import make_plan
from tests.makers import TINY_GPT
from trainer.config.averages import settle_averages
from trainer.config.compose import compose, to_config
from trainer.config.schema import ShardingConfig
from trainer.distributed.materialize import construct, materialize
from trainer.distributed.processes import Processes
from trainer.distributed.sharding import shard
from trainer.errors import ConfigError


class Base(nn.Module):
    def __init__(self, file: str | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        if file is not None:
            self.load(file)

    def load(self, file: str) -> None:
        load_model(self, file)

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, 7.0)

    def shard_blocks(self) -> list[nn.Module]:
        return [self.body]


class ByTorch(Base):
    def load(self, file: str) -> None:
        self.load_state_dict(torch.load(file.replace(".safetensors", ".pt")))


class Assigned(Base):
    def load(self, file: str) -> None:
        self.load_state_dict(load_file(file), assign=True)


class ByHand(Base):
    def load(self, file: str) -> None:
        for name, value in load_file(file).items():
            self.get_parameter(name).data.copy_(value)


class FrozenBody(Base):
    """Only the body is loaded, and it is frozen then."""

    def load(self, file: str) -> None:
        self.body.load_state_dict({n[5:]: v for n, v in load_file(file).items() if n.startswith("body.")})
        self.body.requires_grad_(False)


class Positions(Base):
    """A constructor that computes a frozen table by numpy, and sets a scale to a number."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(2), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(1))
        self.register_buffer("table", torch.empty(2))
        with torch.no_grad():
            self.positions.copy_(torch.from_numpy(np.ones(2, dtype=np.float32)))
            self.table.copy_(torch.from_numpy(np.ones(2, dtype=np.float32)))
            self.scale[0] = 1.0


@pytest.fixture
def file(tmp_path: Path) -> str:
    weights = {name: torch.full_like(value, 3.0) for name, value in Base().state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    return str(tmp_path / "w.safetensors")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Base, ByTorch, Assigned, ByHand, FrozenBody])
def test_weights_that_a_constructor_loads_are_not_initialised_over(file: str, kind: type[Base]) -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    network = shard(lambda: kind(file), ShardingConfig(), alone, on_meta=True, seed=5)
    torch.manual_seed(5)
    expected = kind(file).state_dict()
    found: dict[str, Tensor] = network.module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(found["body.weight"], torch.full((2, 2), 3.0))
    assert network.built_whole and network.loads_weights


def test_a_constructor_that_calls_from_pretrained_keeps_what_it_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
    config = transformers.GPT2Config(vocab_size=8, n_positions=8, n_layer=1, n_head=1, n_embd=4)
    source = transformers.GPT2LMHeadModel(config)
    source.save_pretrained(tmp_path)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)

        def init_weights(self) -> None:
            raise AssertionError("called")

        def shard_blocks(self) -> list[nn.Module]:
            return []

    model, is_meta = construct(Wrapped, on_meta=True, seed=0)
    assert not is_meta
    assert torch.equal(model.inner.lm_head.weight, source.lm_head.weight)


@pytest.mark.parametrize("make", [Base, Positions])
def test_a_model_that_loads_nothing_is_built_on_meta_and_initialised(make: type[Base]) -> None:
    model, is_meta = construct(make, on_meta=True, seed=0)
    assert is_meta and all(tensor.is_meta for tensor in model.state_dict().values())
    network = shard(make, ShardingConfig(), Processes(0, 1, torch.device("cpu")), on_meta=True, seed=0)
    assert torch.equal(network.module.get_parameter("head.bias"), torch.full((2,), 7.0))
    assert not network.built_whole and not network.loads_weights


def test_a_plan_counts_the_host_memory_of_a_model_that_is_built_whole(file: str) -> None:
    target = f"{__name__}.Base"
    overrides = [one for one in TINY_GPT if not one.startswith("model.")]
    custom = ["model=custom", f"model._target_={target}", "sharding=fsdp"]
    for extra, expected in (([], 0), ([f"+model.file={file}"], 12 * 4)):
        config = to_config(compose([*overrides, *custom, *extra])[0])
        plan = make_plan(config, settle_averages(config), 2, 8, [target])
        assert (plan.building, plan.num_parameters) == (expected, 12)


class Huge(nn.Module):
    """More than any machine has: 2^62 bytes of weights, which the meta device can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2**30, 2**30))

    def init_weights(self) -> None: ...

    def shard_blocks(self) -> list[nn.Module]:
        return []


def test_a_model_that_does_not_fit_into_memory_is_refused_in_one_line() -> None:
    with torch.device("meta"):
        model = Huge()
    with pytest.raises(ConfigError, match=r"^model: RuntimeError: .*allocate"):
        materialize(model, torch.device("cpu"), seed=0)

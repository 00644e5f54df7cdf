"""Groups of parameters with their own optimizers. The peers are torch's optimizers, made and stepped by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.makers import save_checkpoint
from trainer.checkpoint.training_state import load_training_state, training_state
from trainer.config.schema import OptimizerConfig
from trainer.errors import ConfigError
from trainer.optimizers import class_name, make_optimizer, set_lr, step_unless

MUON = {"params": ["blocks.*"], "ndim": 2, "_target_": "trainer.optimizers.muon.Muon"}


class Net(nn.Module):
    """An embedding, two blocks of 7 and 1 rows (uneven and empty over two ranks), and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(3, 5, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 1)])
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def config(groups: dict[str, Any], **settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.1, "args": {"weight_decay": 0.5}, "groups": groups, **settings})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        set_lr(optimizer, 1.0 - step / 10)
        step_unless(optimizer, torch.tensor(True))
        optimizer.zero_grad(set_to_none=True)


def described(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, float, float]]:
    """Name, learning rate and weight decay of each parameter, in the order of the optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (names[parameter], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def test_the_first_group_that_matches_takes_a_parameter_and_the_schedule_reaches_all() -> None:
    model = Net()
    groups = {
        "first": {"params": ["blocks.0.*"], "lr_factor": 0.5},
        "blocks": {"params": ["blocks.*", "head.bias"], "lr": 0.4, "args": {"weight_decay": 0.25}},
        "head": {"params": ["head.*"], "decay_vectors": True, "args": {"weight_decay": 0.0}},
    }
    optimizer = make_optimizer(model, config(groups))
    expected = [
        ("embed.weight", 0.1, 0.5),
        ("blocks.0.weight", 0.05, 0.5),
        ("blocks.0.bias", 0.05, 0.0),
        ("blocks.1.weight", 0.4, 0.25),
        ("blocks.1.bias", 0.4, 0.0),
        ("head.bias", 0.4, 0.0),
        ("head.weight", 0.1, 0.0),
    ]
    assert described(model, optimizer) == expected
    set_lr(optimizer, 0.5)
    assert described(model, optimizer) == [(name, lr * 0.5, decay) for name, lr, decay in expected]
    assert class_name(optimizer) == "AdamW"


class Teaches(Net):
    """A model whose head is not for the optimizer."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in super().named_parameters(*args, **kwargs) if not pair[0].startswith("head."))


def test_what_a_model_does_not_show_is_not_trained() -> None:
    model = Teaches()
    trained = [
        parameter for group in make_optimizer(model, config({})).param_groups for parameter in group["params"]
    ]
    assert len(trained) == 5 and all(
        parameter is not own for parameter in trained for own in model.head.parameters()
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": {"params": ["block.*"]}}, "a.params: 'block.*' matches no trainable parameter that earlier"),
        (
            {"a": {"params": ["*.bias"], "ndim": 2}},
            "a.params: '*.bias' matches no trainable parameter of 2 dim",
        ),
        ({"a": {"params": ["*"]}, "b": {"params": ["head.*"]}}, "b.params: 'head.*' matches no"),
        ({"a": {"params": []}}, "a.params: expected patterns of parameter names"),
        ({"a": {"params": "blocks"}}, "a.params: "),
        ({"a": ["blocks.*"]}, "a: expected the keys of a group"),
        (
            {"a": {"params": ["*"], "lr_facto": 1}},
            "a.lr_facto: unknown key; did you mean optimizer.groups.a.lr_f",
        ),
        ({"a": {"params": ["*"], "momentum": 1}}, "a.momentum: unknown key; arguments of the optimizer are"),
        ({"a": {"params": ["*"], "lr": -1}}, "a.lr: expected a number of at least 0"),
        ({"a": {"params": ["*"], "lr": "x"}}, "a.lr: "),
        ({"a": {"params": ["*"], "lr": 1, "lr_factor": 1}}, "a.lr_factor: optimizer.groups.a.lr is set too"),
        ({"a": {"params": ["*"], "name": ""}}, "a.name: expected a name"),
        ({"a": {"params": ["*"], "name": "Mun"}}, "a.name: torch.optim has no 'Mun'; did you mean Muon"),
        ({"a": {"params": ["*"], "_target_": "os.system"}}, "a._target_: 'os.system' is not under"),
        ({"a": {"params": ["*"], "args": {"momentum": 1}}}, "a.args.momentum: AdamW takes no such argument"),
        ({"a": {"params": ["*"], "args": {"betas": [0.9, 2]}}}, "a.args: AdamW: Invalid beta"),
        ({"a": {"params": ["blocks.*"], "name": "Muon"}}, "a.args: Muon: Muon only supports 2D parameters"),
    ],
)
def test_a_mistake_in_a_group_is_one_line_with_its_key(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_optimizer(Net(), config(groups))
    assert str(error.value).startswith(f"optimizer.groups.{message}") and "\n" not in str(error.value)
    assert "removes it" not in str(error.value)  # the group may have it from optimizer.args


def test_muon_and_adamw_train_as_torchs_two_optimizers_do() -> None:
    ours, theirs = Net(), Net()
    optimizer = make_optimizer(ours, config({"hidden": {**MUON, "args": {"momentum": 0.8}}}))
    assert class_name(optimizer) == "AdamW + Muon"
    train(ours, optimizer, 0, 4)
    matrices = [block.weight for block in theirs.blocks]
    vectors = [theirs.blocks[0].bias, theirs.blocks[1].bias, theirs.head.bias]
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs.embed.weight, theirs.head.weight], "weight_decay": 0.5},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    muon = torch.optim.Muon(matrices, momentum=0.8)
    for step in range(4):
        theirs(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for one in (adamw, muon):
            for group in one.param_groups:
                group["lr"] = 0.1 * (1.0 - step / 10)
            one.step()
            one.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_skipped_step_changes_no_part() -> None:
    model = Net()
    optimizer = make_optimizer(model, config({"hidden": MUON}, args={"fused": True}))
    train(model, optimizer, 0, 1)
    tensors = [*model.parameters(), *(t for entry in optimizer.state.values() for t in entry.values())]
    before = [tensor.clone() for tensor in tensors]
    model(torch.full((8, 3), torch.nan)).mean().backward()
    step_unless(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_the_flag_of_a_step_is_read_once_for_all_parts() -> None:
    """A second read would wait for the step of the first part on a GPU."""
    model = Net()
    optimizer = make_optimizer(model, config({"hidden": MUON}))
    model(torch.randn(8, 3)).mean().backward()
    finite = MagicMock()
    finite.__bool__.return_value = True
    step_unless(optimizer, finite)
    assert finite.__bool__.call_count == 1


OWN = """
import torch

class Counting(torch.optim.SGD):
    def step(self, closure=None):
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        self.state["total"] = self.state.get("total", torch.zeros(1)) + self.param_groups[0]["count"]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += self.state["total"]
"""


def test_several_optimizers_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also two whose own state, in a group and beside the parameters, has the same names."""
    (tmp_path / "my_counting.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"_target_": "my_counting.Counting", "lr": 0.01}
    groups = {
        "hidden": MUON,
        "one": {"params": ["head.weight"], **own},
        "other": {"params": ["head.*"], **own, "args": {"momentum": 0.5}},
    }

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Net(seed)
        return model, make_optimizer(model, config(groups), ["my_counting."])

    whole, optimizer = fresh(0)
    train(whole, optimizer, 0, 3)
    path = save_checkpoint(tmp_path, 3, training_state(whole, optimizer), keep=1)
    train(whole, optimizer, 3, 6)
    resumed, its_optimizer = fresh(1)
    load_training_state(path, resumed, its_optimizer)
    train(resumed, its_optimizer, 3, 6)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = Net()
    with pytest.raises(ConfigError, match=r"was saved with AdamW \+ Muon \+ Counting; got AdamW$"):
        load_training_state(path, plain, make_optimizer(plain, config({})))


def sharded_muon(mesh_shape: tuple[int, ...]) -> tuple[list[Tensor], int]:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    optimizer = make_optimizer(model, config({"hidden": MUON}))
    train(model, optimizer, 0, 3)
    with CommDebugMode() as traffic:
        optimizer.step()  # without gradients: no collective
    assert traffic.get_total_counts() == 0
    buffers = [entry["momentum_buffer"] for entry in optimizer.state.values() if "momentum_buffer" in entry]
    assert len(buffers) == 2 and all(isinstance(buffer, DTensor) for buffer in buffers)
    return [parameter.full_tensor().detach() for parameter in model.parameters()], len(buffers)


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)])
def test_muon_on_shards_equals_one_process(ranks, mesh_shape) -> None:
    alone = Net()
    train(alone, make_optimizer(alone, config({"hidden": MUON})), 0, 3)
    for weights, _ in ranks(2 if len(mesh_shape) == 1 else 4, sharded_muon, mesh_shape):
        torch.testing.assert_close(weights, list(alone.parameters()), rtol=1e-5, atol=1e-5)


def refusal() -> str:
    model = fully_shard(Net(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ConfigError) as error:
        make_optimizer(model, config({"hidden": {"params": ["blocks.*"], "ndim": 2, "name": "Muon"}}))
    return str(error.value)


def test_torchs_own_muon_is_refused_on_shards(ranks) -> None:
    (message,) = set(ranks(2, refusal))
    assert message.startswith("optimizer.groups.hidden.name: torch's Muon takes no sharded parameters; set")

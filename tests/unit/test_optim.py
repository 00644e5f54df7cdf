"""Optimizers, schedules, clipping and the guarded step. Norms are checked against `torch.nn.utils` and by hand."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from trainer.config.schema import OptimizerConfig, ScheduleConfig
from trainer.errors import ConfigError
from trainer.optimizers import clip_grad_norm, lr_factor, make_optimizer, set_lr, step_unless
from trainer.optimizers.schedule import warmup_warnings


class Net(nn.Module):
    """7 and 1 rows: uneven over two ranks, empty on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 7)
        self.narrow = nn.Linear(7, 1)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def with_grads(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Gradients that the global mean loss would give, on one rank or on many."""
    torch.manual_seed(1)
    (model(torch.randn(8, 3)).square().mean() * scale).backward()
    return model


def test_vectors_are_spared_weight_decay_and_frozen_parameters_left_out():
    optimizer = make_optimizer(
        net(), OptimizerConfig(lr=0.5, args={"weight_decay": 0.1, "betas": [0.8, 0.9]})
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [[p.ndim for p in group["params"]] for group in optimizer.param_groups] == [[2, 2], [1, 1]]
    assert all((group["lr"], group["betas"]) == (0.5, (0.8, 0.9)) for group in optimizer.param_groups)


def test_trainable_float16_is_refused():
    with pytest.raises(ConfigError, match=r"^model: expected trainable parameters .* got float16$"):
        make_optimizer(net().half(), OptimizerConfig())
    frozen = net()
    frozen.frozen.data = frozen.frozen.data.half()
    make_optimizer(frozen, OptimizerConfig())


def test_vectors_decay_too_if_asked_for():
    (group,) = make_optimizer(
        net(), OptimizerConfig(args={"weight_decay": 0.1}, decay_vectors=True)
    ).param_groups
    assert len(group["params"]) == 4 and group["weight_decay"] == 0.1


def test_a_model_of_vectors_alone_and_a_tied_parameter_are_fine():
    model = nn.ModuleList([nn.LayerNorm(4)])
    assert len(make_optimizer(model, OptimizerConfig()).param_groups) == 1
    tied = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    tied[1].weight = tied[0].weight
    assert [len(group["params"]) for group in make_optimizer(tied, OptimizerConfig()).param_groups] == [1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="adamw"), "optimizer.name: torch.optim has no 'adamw'; did you mean AdamW"),
        (OptimizerConfig(name="lr_scheduler"), "optimizer.name: torch.optim has no 'lr_scheduler'"),
        (OptimizerConfig(name="Optimizer"), "optimizer.name: torch.optim has no 'Optimizer'"),
        (OptimizerConfig(name="LBFGS"), "optimizer.name: LBFGS needs a closure"),
        (
            OptimizerConfig(args={"momentum": 0.9}),
            "optimizer.args.momentum: AdamW takes no such argument; it takes",
        ),
        (OptimizerConfig(args={"lr": 0.1}), "optimizer.args.lr: the learning rate is optimizer.lr"),
        (OptimizerConfig(args={"betas": [0.9, 1.5]}), "optimizer.args: AdamW: Invalid beta parameter"),
        (OptimizerConfig(args={"betas": 0.9}), "optimizer.args: AdamW: "),
    ],
)
def test_a_wrong_optimizer_is_named(config, message):
    with pytest.raises(ConfigError) as error:
        make_optimizer(net(), config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_error_of_any_class_in_a_part_of_the_users_own_is_one_line(tmp_path, monkeypatch):
    source = (
        "def optimizer(params, lr):\n    assert not lr\ndef schedule(step, steps):\n    return [][step]\n"
    )
    (tmp_path / "my_failing_parts.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    optimizer, schedule = "my_failing_parts.optimizer", "my_failing_parts.schedule"
    with pytest.raises(ConfigError, match=rf"^optimizer\.args: {optimizer}: AssertionError \("):
        make_optimizer(nn.Linear(2, 1), OptimizerConfig(_target_=optimizer), [optimizer])
    with pytest.raises(ConfigError, match=rf"^schedule: {schedule}: IndexError: list index out of range"):
        lr_factor(ScheduleConfig(_target_=schedule), 10, [schedule])


class Stepless(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})


def test_an_optimizer_without_a_step_is_refused():
    target = f"{__name__}.Stepless"
    with pytest.raises(
        ConfigError, match=rf"^optimizer\._target_: expected .* a step\(\), {target} has none"
    ):
        make_optimizer(net(), OptimizerConfig(_target_=target), [target])


def test_a_setting_of_the_group_is_no_argument_of_the_schedule() -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=2, args={"warmup_steps": 4})
    with pytest.raises(ConfigError, match=r"^schedule\.args\.warmup_steps: set schedule\.warmup_steps"):
        lr_factor(config, 10)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-0.5", "None", "1 / 0"])
def test_a_factor_that_is_no_rate_is_refused_at_its_step(tmp_path, monkeypatch, value):
    (tmp_path / "my_rate.py").write_text(
        f"def rate(step, steps):\n    return {value} if step == 3 else 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rate", raising=False)
    factor = lr_factor(ScheduleConfig(_target_="my_rate.rate"), 10, ["my_rate."])
    assert factor(2) == 1.0
    with pytest.raises(ConfigError, match=r"^schedule: my_rate\.rate: "):
        factor(3)


def test_a_warm_up_that_leaves_no_step_to_a_decay_is_a_warning():
    (warning,) = warmup_warnings(ScheduleConfig(name="wsd", warmup_steps=6), 6)
    assert warning.startswith("schedule.warmup_steps: 6 steps of warm-up in a run of 6")
    for name, warmup in (("wsd", 5), ("cosine", 0), ("constant", 6), ("inverse_sqrt", 6)):
        assert warmup_warnings(ScheduleConfig(name=name, warmup_steps=warmup), 6) == []


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="expected at least one trainable parameter"):
        make_optimizer(net().requires_grad_(False), OptimizerConfig())


def test_constant_stays_at_the_peak_after_the_warm_up():
    factor = lr_factor(ScheduleConfig(name="constant", warmup_steps=4), 10)
    assert [factor(step) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(ScheduleConfig(), 10)(1) == 1.0


def test_cosine_falls_from_the_end_of_the_warm_up_to_the_last_step():
    factor = lr_factor(ScheduleConfig(name="cosine", warmup_steps=2, min_ratio=0.1), 10)
    assert factor(2) == 1.0
    assert factor(6) == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert factor(4) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(10) == pytest.approx(0.1) and factor(11) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_linear_over_its_last_fraction():
    factor = lr_factor(ScheduleConfig(name="wsd", warmup_steps=2, decay_fraction=0.4, min_ratio=0.2), 10)
    assert [factor(step) for step in (1, 2, 6)] == [0.5, 1.0, 1.0]
    assert [factor(step) for step in (7, 8, 9, 10)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_inverse_sqrt_continues_the_warm_up_whatever_the_length_of_the_run():
    factors = [lr_factor(ScheduleConfig(name="inverse_sqrt", warmup_steps=4), steps) for steps in (10, 1000)]
    assert [[factor(step) for step in (2, 4, 9, 16, 64)] for factor in factors] == [
        pytest.approx([0.5, 1.0, 2 / 3, 0.5, 0.25])
    ] * 2
    assert lr_factor(ScheduleConfig(name="inverse_sqrt"), 10)(4) == 0.5  # without a warm-up: 1 / sqrt(step)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd", "inverse_sqrt"])
def test_a_warm_up_longer_than_the_run_just_rises(name):
    factor = lr_factor(ScheduleConfig(name=name, warmup_steps=20), 10)
    assert [factor(step) for step in (1, 10)] == [0.05, 0.5]


def test_the_learning_rate_reaches_every_group_as_a_number_or_in_place():
    optimizer = make_optimizer(net(), OptimizerConfig(lr=0.5))
    kept = optimizer.param_groups[1]["lr"] = torch.tensor(1.0)
    set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[1]["lr"] is kept and kept == 0.25


@pytest.mark.parametrize("double", ["none", "one", "all"])
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1e6])
def test_clipping_one_process_equals_torch(max_norm, double):
    ours, theirs = with_grads(net(), 100.0), with_grads(net(), 100.0)
    for module in (ours, theirs):
        if double != "none":
            (module if double == "all" else next(module.children())).double()
    norm = clip_grad_norm(ours.parameters(), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
    torch.testing.assert_close(norm, expected.float())
    assert norm.ndim == 0 and norm.dtype == torch.float32
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_within_the_norm_are_untouched_bit_for_bit():
    model = with_grads(net())
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    clip_grad_norm(model.parameters(), 1e6)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, list(model.parameters())[1:], strict=True))


def test_parameters_without_a_gradient_are_skipped():
    assert clip_grad_norm(net().parameters(), 1.0) == 0
    assert clip_grad_norm([], 1.0) == 0
    model = with_grads(net())
    model.wide.weight.grad = None
    assert clip_grad_norm(model.parameters(), 1.0) > 0


def test_a_norm_whose_square_overflows_float32_is_still_a_number():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.full((1,), 1.5e19)
    assert clip_grad_norm(parameters, 1.0) == 3e19
    assert [p.grad.item() for p in parameters] == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_returned_and_spoils_nothing(bad):
    model = with_grads(net())
    model.wide.bias.grad[0] = bad
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert not clip_grad_norm(model.parameters(), 1e-3).isfinite()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def test_complex_gradients_have_the_norm_of_torch():
    weights = [nn.Parameter(torch.zeros(3, dtype=torch.complex64)), nn.Parameter(torch.zeros(2))]
    (weights[0].conj() * torch.tensor([3 + 4j, 0, 0])).real.sum().backward()
    weights[1].grad = torch.tensor([12.0, 0])
    assert weights[0].grad.is_conj(), "autograd leaves the conjugation to the reader"
    assert clip_grad_norm(weights, 6.5).item() == 13
    torch.testing.assert_close(weights[0].grad.resolve_conj(), torch.tensor([1.5 + 2j, 0, 0]))
    torch.testing.assert_close(weights[1].grad, torch.tensor([6.0, 0]))


def test_bfloat16_gradients_are_measured_in_float32():
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    parameter.grad = torch.full((1000,), 0.01, dtype=torch.bfloat16)
    exact = parameter.grad.double().norm()
    assert clip_grad_norm([parameter], 0.0).item() == pytest.approx(exact.item(), rel=1e-6)


OPTIMIZERS = [
    ("AdamW", {"fused": True}),
    ("AdamW", {"fused": False}),
    ("AdamW", {"fused": True, "amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"fused": True}),
    ("SGD", {"momentum": 0.9, "fused": True, "nesterov": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"fused": True}),
    ("SGD", {}),
    ("Adagrad", {"fused": True}),
    ("RAdam", {}),
]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return [_local(tensor).detach().clone() for tensor in (*model.parameters(), *tensors)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def run(model: nn.Module, name: str, args: dict[str, Any], finite: list[bool]) -> list[Tensor]:
    """Steps with good gradients where `finite`, with NaN ones elsewhere; what they leave behind."""
    optimizer = make_optimizer(model, OptimizerConfig(name=name, lr=0.1, args=args))
    for good in finite:
        with_grads(model)
        if not good:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(math.nan)
        step_unless(optimizer, clip_grad_norm(model.parameters(), 1.0).isfinite())
        optimizer.zero_grad(set_to_none=True)
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    return snapshot(model, optimizer)


@pytest.mark.parametrize(("name", "args"), OPTIMIZERS)
@pytest.mark.parametrize("skipped", [[True, False, False, True], [False, True, True]])
def test_a_step_with_nan_gradients_leaves_weights_and_state_bit_for_bit(name, args, skipped):
    """Also before the first good step, where torch's fused SGD would keep an uninitialised momentum buffer."""
    taken = [good for good in skipped if good]
    for one, other in zip(run(net(), name, args, skipped), run(net(), name, args, taken), strict=True):
        assert torch.equal(one, other)
    assert len(run(net(), name, args, taken)) >= len(list(net().parameters()))


def test_a_fused_step_does_not_read_the_flag_on_the_host():
    class Unreadable(Tensor):
        def __bool__(self) -> bool:
            raise AssertionError("waited for the device")

    model = with_grads(net())
    finite = torch.tensor(True).as_subclass(Unreadable)
    step_unless(make_optimizer(model, OptimizerConfig(args={"fused": True})), finite)
    with pytest.raises(AssertionError, match="waited"):
        step_unless(make_optimizer(model, OptimizerConfig(args={"fused": False})), finite)


def sharded(mesh_shape: tuple[int, ...]) -> nn.Module:
    names = ("replicate", "shard") if len(mesh_shape) == 2 else ("shard",)
    return fully_shard(net(), mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))


def clipped(mesh_shape: tuple[int, ...], max_norm: float) -> tuple[float, list[Tensor], int]:
    model = sharded(mesh_shape)
    extra = nn.Parameter(torch.ones(2))  # a plain parameter beside sharded ones
    extra.grad = torch.full((2,), 3.0)
    with_grads(model, 100.0)
    with CommDebugMode() as traffic:
        norm = clip_grad_norm([*model.parameters(), extra], max_norm)
    assert type(norm) is Tensor
    grads = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]
    return norm.item(), [*grads, extra.grad], traffic.get_total_counts()


def plain_clipped(max_norm: float) -> tuple[float, list[Tensor]]:
    model = with_grads(net(), 100.0)
    extra = nn.Parameter(torch.ones(2))
    extra.grad = torch.full((2,), 3.0)
    norm = nn.utils.clip_grad_norm_([*model.parameters(), extra], max_norm)
    return norm.item(), [p.grad for p in (*model.parameters(), extra) if p.grad is not None]


@pytest.mark.parametrize("mesh_shape", [(2,), (2, 2)])
def test_clipping_uneven_empty_and_replicated_shards_equals_one_process(ranks, mesh_shape):
    norm, grads = plain_clipped(1.0)
    for sharded_norm, sharded_grads, collectives in ranks(math.prod(mesh_shape), clipped, mesh_shape, 1.0):
        assert sharded_norm == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(sharded_grads, grads)
        assert collectives == 1


def sharded_run(name: str, args: dict[str, Any], finite: list[bool]) -> list[Tensor]:
    return run(sharded((2,)), name, args, finite)


def test_a_sharded_step_with_nan_gradients_leaves_every_shard_bit_for_bit(ranks):
    for name, args in (OPTIMIZERS[0], OPTIMIZERS[1], OPTIMIZERS[5]):
        mixed = ranks(2, sharded_run, name, args, [False, True, False, True])
        good = ranks(2, sharded_run, name, args, [True, True])
        for one, other in zip(mixed, good, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fused_sgd_refusal() -> str:
    with pytest.raises(ConfigError) as error:
        make_optimizer(sharded((2,)), OptimizerConfig(name="SGD", args={"fused": True}))
    return str(error.value)


def test_a_fused_kernel_that_takes_no_shards_is_refused_by_name(ranks):
    assert set(ranks(2, fused_sgd_refusal)) == {
        "optimizer.args.fused: torch has no fused SGD for sharded parameters"
    }

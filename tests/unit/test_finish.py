"""What the summary of a run says. Values are those of the records that each test writes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.makers import make_run_dir
from trainer.finish import NextCommands, summarise, tries, write_result
from trainer.report import read_run, write_report_of
from trainer.report.comparison import combine
from trainer.report.first_screen import commands_of
from trainer.report.runs import Run
from trainer.report.text.table import table_of
from trainer.rundir.directory import RunDir
from trainer.rundir.pairs import Pairs

FACTORY = "transformers.AutoModelForCausalLM.from_config"


def summary(
    folder: Path, *records: dict[str, Any], ema: dict[str, Any] | None = None, **meta: Any
) -> dict[str, Any]:
    facts = {"primary_metric": "loss", "higher_is_better": [], "git": None, **meta}
    config = yaml.safe_dump({"ema": ema or {"update_every": 1}})
    run = make_run_dir(folder / "run", config, **facts)
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return dict(summarise(read_run(run.path)))


def at(step: int, live: float | None, decay: float | None = None, **averages: float) -> dict[str, Any]:
    losses = {f"eval/ema/{name}/loss": value for name, value in averages.items()}
    decays = {f"ema/{name}/decay": decay for name in averages} if decay is not None else {}
    return {"train/step": step, "eval/live/loss": live, **losses, **decays}


def test_best_live_and_best_average_each_at_its_own_step_and_the_winning_decay(tmp_path: Path) -> None:
    records = at(10, 2.0, 0.9, a=1.5, b=1.75), at(20, 2.5, 0.9, a=1.25, b=1.0), at(30, 3.0, 0.9, a=2.0, b=2.0)
    records[1]["ema/b/decay"] = 0.99
    assert summary(tmp_path, *records) == {
        "best/live/loss": 2.0,
        "best/live/step": 10,
        "best/ema/loss": 1.0,
        "best/ema/step": 20,
        "best/ema/name": "b",
        "best/ema/decay": 0.99,
    }


def test_where_more_is_better_the_largest_is_best(tmp_path: Path) -> None:
    records = [
        {"train/step": step, "eval/live/accuracy": live, "eval/ema/a/accuracy": average, "ema/a/decay": 0.5}
        for step, live, average in ((1, 0.5, 0.75), (2, 0.625, 0.25))
    ]
    found = summary(tmp_path, *records, primary_metric="accuracy", higher_is_better=["accuracy"])
    assert (found["best/live/accuracy"], found["best/live/step"]) == (0.625, 2)
    assert (found["best/ema/accuracy"], found["best/ema/step"]) == (0.75, 1)


def test_a_decay_that_varies_is_the_one_in_force_at_the_best_evaluation(tmp_path: Path) -> None:
    """A power average's decay rises; the evaluation at step 25 was between two logged steps."""
    logged = (
        {"train/step": step, "ema/p/decay": decay} for step, decay in ((10, 0.5), (20, 0.75), (30, 0.875))
    )
    first, second, third = logged
    found = summary(tmp_path, first, second, at(25, 2.0, p=1.0), third, at(40, 2.0, p=1.5))
    assert (found["best/ema/step"], found["best/ema/decay"]) == (25, 0.75)


@pytest.mark.parametrize(
    "ema", [{"update_every": 10}, {"update_every": 1, "averages": {"a": {"update_every": 10}}}]
)
def test_the_decay_is_that_of_a_step_however_many_an_update_stands_for(
    tmp_path: Path, ema: dict[str, Any]
) -> None:
    assert summary(tmp_path, at(10, 2.0, 0.999**10, a=1.0), ema=ema)["best/ema/decay"] == 0.999


def test_what_was_never_evaluated_or_finite_has_no_place(tmp_path: Path) -> None:
    assert summary(tmp_path, at(10, None), {"train/step": 20, "train/loss": 1.0}) == {}
    assert summary(tmp_path / "live", at(10, 2.0)) == {"best/live/loss": 2.0, "best/live/step": 10}


def test_loggers_get_a_table_of_each_metric_by_its_name(tmp_path: Path) -> None:
    class Tables:
        def __init__(self) -> None:
            self.names: list[str] = []

        def image(self, step: int, name: str, path: str) -> None:
            pass

        def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
            self.names.append(name)

    (tmp_path / "metrics.jsonl").write_text(
        '{"train/step": 10, "eval/live/loss": 2.0, "eval/live/words: many": 0.5}\n'
    )
    logger = Tables()
    write_result(read_run(tmp_path), None, logger, 10)  # type: ignore[arg-type]
    assert logger.names == ["report/loss", "report/words: many"]


def long_horizons(folder: Path) -> Run:
    config = {"ema": {"type": "constant", "decay": 0.999}}
    run = make_run_dir(folder / "run", yaml.safe_dump(config), primary_metric="loss", higher_is_better=[])
    run.metrics_path.write_text(json.dumps(at(1000, 1.0, 0.999, a=1.5)) + "\n")
    return read_run(run.path)


def following(
    folder: Path,
    live: float,
    *typed: str,
    axis: int = 0,
    rule: Any = None,
    model: str = "",
    allowed: Sequence[str] = (),
    **averages: float,
) -> list[str]:
    config: dict[str, Any] = {
        "model": {"_target_": model},
        "seed": 7,
        "trainer": {"steps": 1000, "eval_samples": 100},
        "optimizer": {"lr": 0.003},
        "callbacks": {"norms": {"_target_": "my_calls.Norms"}},
        "ema": {"type": "constant", "rule": rule, "decays": [0.9, 0.99], "decay": 0.9, "averages": {}},
    }
    config |= {key: value for key, _, value in (word.partition("=") for word in typed) if key == "fork"}
    if axis:
        config["ema"] |= {"decays": [], "axis": axis, "axis_grows": True}
    run = make_run_dir(folder / "run", yaml.safe_dump(config), primary_metric="loss", higher_is_better=[])
    gaps = {f"eval/gap/{name}/loss": live - value for name, value in averages.items()}
    errors = {f"{key}_se": 0.001 for key in gaps}
    run.metrics_path.write_text(json.dumps(at(1000, live, 0.9, **averages) | gaps | errors) + "\n")
    done = read_run(run.path)
    blocks = NextCommands(run, list(typed), list(allowed), 1, 1).after_finish(done, "wandb sync x")
    return [line for block in blocks for line in block]


def test_the_winner_is_exported_first_and_then_the_run_is_made_longer_repeated_and_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = following(tmp_path, 2.0, "experiment=x", "seed=7", "ema.decay=0.9", a=1.5, b=1.9)
    commands = [re.sub(r".*-m ", "", line) for line in lines if "python -m" in line or "wandb" in line]
    assert commands == [
        "launch.export run weights=ema/a out=run.safetensors",
        "trainer resume=run trainer.steps=2000",
        "trainer experiment=x ema.decay=0.9 seed=8",
        "trainer experiment=x seed=7 'ema.decays=[0.7,0.9,0.99,0.997]'",
        "launch.compare run",
        "  wandb sync x",
    ]
    assert "No average won. Begin the run again with one of:" not in lines


def test_a_fork_is_not_repeated_with_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares the steps of the run that it forks, so it would count as the same seed."""
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(following(tmp_path, 2.0, "fork=base@200", "seed=7", a=1.5))
    assert "another seed" not in lines and "seed=8" not in lines
    assert "-m trainer fork=base@200 seed=7 'ema.decays=[0.7," in lines
    (tmp_path / "start").mkdir()
    assert "seed=8" in "\n".join(following(tmp_path / "start", 2.0, "fork=null", "seed=7", a=1.5))


def test_after_a_bank_of_the_axis_no_wider_bank_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(following(tmp_path, 1.0, "experiment=x", "ema=axis", axis=10, a=1.5, b=1.9))
    assert "ema.decays=[0" not in lines and "ema.decay=" not in lines
    cleared = "'ema.decays=[]' ema.averages=null ema.axis=0 ema.axis_grows=false"
    assert f"-m trainer experiment=x ema=fraction {cleared}\n" in lines


@pytest.mark.parametrize(
    ("steps", "kept", "session", "is_better"),
    [
        ((1.0, 2.0), True, [], True),
        ((1.0, 2.0), False, [], True),
        ((1.9, 2.0), True, [], False),  # the standard error of the difference is 0.16
        ((2.0, 1.0), True, [], False),
        ((1.0, 2.0), True, ["trainer.eval_samples=64"], False),  # the first step had other samples
    ],
)
def test_after_an_earlier_step_that_was_better_no_longer_run_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: tuple[float, float],
    kept: bool,
    session: list[str],
    is_better: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_dump({"trainer": {"steps": 20}})
    facts: dict[str, Any] = {"primary_metric": "loss", "higher_is_better": []}
    run = make_run_dir("run", config, **facts, resumed=[{"overrides": session, "config": config}])
    losses = [at(10 + 10 * place, own + 0.5, a=own) for place, own in enumerate(steps)]
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in losses))
    values = steps[1] + np.tile([-1.0, 1.0], 40)
    pairs = Pairs.of(20, {"loss": {"live": values + 0.5, "a": values}})
    Path("run/pairs.jsonl").write_text(json.dumps({"train/step": 20, **pairs.to_json()}) + "\n")
    if kept:
        (run.path / "checkpoints" / "step-00000010").mkdir(parents=True)
        (run.path / "checkpoints" / "step-00000010" / "COMMIT.json").touch()
    done = read_run(run.path)
    blocks = NextCommands(run, [], [], 1, 1).after_finish(done)
    lines = "\n".join(line for block in blocks for line in block)
    assert ("trainer.steps=40" in lines) is not is_better
    earlier = "launch.export run weights=ema/a step=10 out=run.safetensors"
    assert (earlier in lines) is (is_better and kept)
    assert blocks[-1][0].startswith("Next (export") is (is_better and kept)
    verdict = table_of(done, "loss").headline
    assert ("become worse since step 10: there EMA a had 1.0000, and the best of" in verdict) is is_better
    assert ("step=10." in verdict, "no checkpoint" in verdict) == (is_better and kept, is_better > kept)
    made = combine([done], "loss")
    assert made is not None and made.headline == verdict


@pytest.mark.parametrize("rule", ["my.rule", {"_target_": "my.rule", "power": 2}])
def test_fraction_replaces_a_rule_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(following(tmp_path, 1.0, "experiment=x", "ema.rule=my.rule", rule=rule, a=1.5))
    assert "-m trainer experiment=x ema=fraction ema.rule=null\n" in lines
    assert "ema.decay=" not in lines and "ema.decays=" not in lines, "the rule decides, not the decay"


def test_without_a_winning_average_whole_commands_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command has no choice of the run that it replaces: a second `ema=` would be refused."""
    monkeypatch.chdir(tmp_path)
    lines = following(
        tmp_path, 1.0, "experiment=x", "ema=bank", "ema.decays=[0.9,0.99]", "run_dir=run", a=1.5, b=1.9
    )
    assert any("launch.export run weights=live" in line for line in lines)
    tried = "\n".join(lines[lines.index("No average won. Begin the run again with one of:") :])
    start = "-m trainer experiment=x"
    assert (
        "  ema=fraction keeps" in tried and f"{start} ema=fraction 'ema.decays=[]' ema.averages=null" in tried
    )
    assert f"{start} ema=bank ema.decay=0.7\n" in tried and "  a shorter horizon" in tried
    assert "trainer.steps=" not in tried.split("Next (")[0]
    assert f"{start} ema=bank 'ema.decays=[0.9,0.99]' optimizer.lr=0.001\n" in tried
    (_, overrides, _), *_ = [one for one in tries(long_horizons(tmp_path / "long")) if "shorter" in one[2]]
    assert overrides == ["ema.decay=0.99"]


def test_the_same_export_is_in_the_list_as_on_the_page_without_a_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = following(tmp_path, 2.0, "experiment=x", a=1.9999)
    command = next(line for line in lines if "launch.export" in line).strip()
    assert command.endswith("launch.export run weights=ema/a out=run.safetensors")
    assert "-m launch.compare run" in lines[lines.index(f"  {command}") + 1]
    comparison = combine([read_run(tmp_path / "run")], "loss")
    assert comparison is not None and commands_of(comparison) == [("Export the best so far", command)]


@pytest.mark.parametrize(
    ("target", "out"),
    [
        (FACTORY, f"run/ 'allow_targets=[{FACTORY}]'"),
        ("diffusers.UNet2DModel", "run/"),
        ("models.gpt.GPT", "run.safetensors"),
        ("peft.get_peft_model", "run.safetensors"),
        ("my_model.Net", "run.safetensors 'allow_targets=[my_model.Net]'"),
    ],
)
def test_the_export_of_a_model_with_from_pretrained_is_a_folder_and_allows_what_the_model_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = following(tmp_path, 2.0, model=target, allowed=["my_calls.Norms", target], a=1.5)
    assert any(line.endswith(f"launch.export run weights=ema/a out={out}") for line in lines)
    comparison = combine([read_run(tmp_path / "run")], "loss")
    assert comparison is not None
    ((title, line),) = commands_of(comparison)  # of a reader who may not trust the run
    assert "allow_targets" not in line
    assert ("needs allow_targets= too" in title) is target.startswith(("my_model.", "transformers."))


def resumed(folder: Path, *overrides: str, session: list[str]) -> str:
    config = yaml.safe_dump({"seed": 3, "trainer": {"steps": 10}})
    meta = {
        "primary_metric": "loss",
        "higher_is_better": [],
        "resumed": [{"overrides": session, "config": config}],
    }
    run = make_run_dir(folder, config, **meta)
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    run.metrics_path.write_text(json.dumps(at(10, 1.0, 0.9, a=0.5)) + "\n")
    blocks = NextCommands(run, None, [], 1, 1).after_finish(read_run(run.path))
    return "\n".join(line for block in blocks for line in block)


def test_a_resumed_run_is_repeated_by_its_stored_overrides_unless_they_may_name_code(tmp_path: Path) -> None:
    """A run directory may come from a stranger, and typing a target allows it."""
    lines = resumed(
        tmp_path / "a", "experiment=x", "trainer.steps=5", session=["resume=a", "trainer.steps=10"]
    )
    assert "-m trainer experiment=x trainer.steps=10 seed=4\n" in lines
    for number, stranger in enumerate(
        ("model._target_=os.system", "trainer.on_checkpoint=rm", "ema.rule=x.y")
    ):
        assert "seed=4" not in resumed(tmp_path / str(number), "experiment=x", stranger, session=[])


def axis_run(folder: Path, horizon: float) -> RunDir:
    config = yaml.safe_dump({"ema": {"axis": 3, "update_every": 1}, "trainer": {"steps": 10}})
    run = make_run_dir(folder, config, primary_metric="loss", higher_is_better=[])
    record = at(10, 2.0, horizon_8=1.5, horizon_16=1.6) | {"ema/horizon_8/decay": 0.875}
    record |= {"axis/horizon": horizon, "axis/loss": 1.4, "axis/predicted_error": 0.004}
    run.metrics_path.write_text(json.dumps(record) + "\n")
    return run


def test_the_best_made_decay_is_shown_and_can_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = axis_run(tmp_path / "run", 10.0 / 3)
    run = read_run(place.path)
    table = table_of(run, "loss")
    assert "Best made decay 0.7, horizon 3.333: loss 1.4000 at step 10, predicted error 0.004." in table.notes
    assert [line.cells[0] for line in table.lines] == ["live", "EMA horizon_8 (0.875)", "EMA horizon_16"]
    (_, *commands) = NextCommands(place, [], [], 1, 1).after_finish(run)[-1]
    assert any(line.endswith("launch.posthoc run decay=0.7 export=run_made.safetensors") for line in commands)
    tracked = axis_run(tmp_path / "tracked", 8.0)
    assert not any("made" in note for note in table_of(read_run(tracked.path), "loss").notes)


def test_the_page_shows_what_may_follow(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 10, "eval/live/loss": 2.0}\n')
    run = read_run(tmp_path)
    blocks = [["No average won. Try:", "  ema=fraction"], ["Next:", "  polyak export a&b"]]
    page = write_report_of(run, blocks).page.read_text()
    text = re.sub(r"\n+", "\n", page)
    assert "<summary>No average won. Try</summary>\n<pre>  ema=fraction" in text
    assert "<summary>Next</summary>\n<pre>  polyak export a&amp;b</pre>" in text and "Next:" not in text


def test_live_weights_that_still_improve_are_named_as_the_reason_for_a_longer_run(tmp_path: Path) -> None:
    config = yaml.safe_dump({"trainer": {"steps": 60}, "ema": {"type": "constant", "decay": 0.9}})
    for name, first, last, expected in (("falls", 1.6278, 1.4985, True), ("rises", 1.4, 1.5, False)):
        run = make_run_dir(tmp_path / name, config, primary_metric="loss", higher_is_better=[])
        records = at(50, first, 0.9, a=1.74), at(60, last, 0.9, a=1.61)
        run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
        why = "live loss still went from 1.6278 to 1.4985 since step 50, so an average lags; train longer"
        assert ((["trainer.steps="], ["trainer.steps=120"], why) in tries(read_run(run.path))) is expected

"""The five checks of a certificate."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from launch.certifying.compare import Worst, bitwise, identical, largest_change, relative
from launch.certifying.impulse import deviation, tolerance
from launch.certifying.request import Request
from launch.certifying.rows import EXPORTED, MERGED, PROFILE, RESUMED, SHARDED, Row, failed, skipped
from launch.certifying.running import RunFailed, train
from launch.certifying.settings import PROCESSES, reordered, sharded, short, unsharded
from launch.exporting.files import parse_out, parse_size
from launch.exporting.options import Options
from launch.exporting.weights import build_plain, export
from launch.merge import parse as parse_merge
from launch.merging.order import Snapshot
from launch.merging.sources import CheckpointReader
from launch.merging.weights import merge, opened
from trainer.build import build_evaluated
from trainer.checkpoint.store import stored_progress
from trainer.config.averages import key_of, settle_averages
from trainer.config.frozen import freeze_config
from trainer.config.schema import Config
from trainer.config.targets import load_rule
from trainer.distributed.processes import Processes, choose_device, join, leave
from trainer.errors import EXIT_BAD_INPUT, ConfigError
from trainer.rundir.checkpoints import committed, step_of
from trainer.rundir.directory import RunDir
from trainer.rundir.keys import AVERAGE, LIVE, evaluation_key
from trainer.rundir.records import records_of

METRIC_TOLERANCE = 1e-6
"""Largest relative difference of the primary metric of an export."""
MARGIN = 4
"""Factor between the effect of one other order of sums and the largest that any order may have."""
MOST_BY_ORDER = 0.1
"""Largest effect of another order of sums, relative to the largest change of a weight, that explains a difference."""
COEFFICIENTS = {2: "[0.25,0.75]", 3: "[0.2,0.3,0.5]"}
"""Coefficients of the merge, by the number of checkpoints."""


@dataclass
class Checks:
    """The checks of one run; they share its short run."""

    request: Request
    folder: Path
    """Existing folder for the short runs."""

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self.request.setting.config

    @property
    def allowed(self) -> Sequence[str]:
        """Prefixes of `_target_` that the user trusts."""
        return self.request.setting.allowed

    def all(self) -> dict[str, Callable[[], Row]]:
        """Return the checks by name, in the order of the certificate."""
        return {
            SHARDED: self.sharded,
            RESUMED: self.resumed,
            EXPORTED: self.exported,
            PROFILE: self.profile,
            MERGED: self.merged,
        }

    @property
    def short_run(self) -> RunDir:
        """The short run of most checks, which has a checkpoint of each step.

        Raises:
            RunFailed: It did not reach its last step.
        """
        if isinstance(self._trained, RunFailed):
            raise self._trained
        return self._trained

    @cached_property
    def _trained(self) -> RunDir | RunFailed:
        """The short run or its failure, so that no check carries it out twice."""
        try:
            return self._train("short", short(self.config, self.request.steps))
        except RunFailed as error:
            return error

    def sharded(self) -> Row:
        """Compare the run in one process with the run whose model is sharded over `PROCESSES` ranks."""
        steps, trainer = self.request.steps, self.config.trainer
        if trainer.global_batch_size % (PROCESSES * trainer.accumulate):
            why = f"{trainer.global_batch_size} with trainer.accumulate={trainer.accumulate} does not split"
            return skipped(SHARDED, f"trainer.global_batch_size: {why} over {PROCESSES} processes")
        if self._is_random():
            why = "a training forward draws random numbers (dropout), others in each number of processes"
            return skipped(SHARDED, why)
        model = build_plain(self.config.model, self.allowed)
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        eps = (trainer.max_grad_norm or 1.0) / math.sqrt(sum(one.numel() for one in model.parameters()))
        try:
            whole = self._train("whole", unsharded(self.config, steps, eps))
            parts = self._train("parts", sharded(self.config, steps, eps), PROCESSES)
        except RunFailed as error:
            if error.code == EXIT_BAD_INPUT:
                return skipped(SHARDED, error.reason)
            raise
        first, *_, last = _checkpoints(whole)
        change = largest_change(first, last, names)
        if not change:
            return failed(SHARDED, f"no parameter changed in {steps} steps")
        worst, tensors = relative(last, _checkpoints(parts)[-1], change, names, steps)
        detail = f"{tensors} parameters and averages after {steps} steps, {PROCESSES} gloo ranks on the CPU"
        allowed = self.request.tolerance
        has_batchnorm = any(isinstance(module, _BatchNorm) for module in model.modules())
        if allowed < worst.difference < math.inf and not has_batchnorm:
            other = self._train("reordered", reordered(self.config, steps, eps))
            order, _ = relative(last, _checkpoints(other)[-1], change, names, steps)
            detail += f"; another order of sums in one process changes {order.difference:.2g}"
            if order.difference <= MOST_BY_ORDER:
                allowed = max(allowed, MARGIN * order.difference)
        return Row(SHARDED, worst.difference, allowed, worst.in_words(detail))

    def _train(self, name: str, config: Config, processes: int = 1) -> RunDir:
        """Carry out a short run in a new folder; errors as for `train`."""
        frozen = freeze_config(config)
        run_dir = RunDir.create(self.folder / name, config_yaml=frozen, overrides=[], meta={"git": None})
        train(run_dir, processes, self.allowed)
        return run_dir

    def _is_random(self) -> bool:
        """Return whether the training loss of the same samples depends on the seed of torch."""
        config = unsharded(self.config, self.request.steps, 0.0)
        with _alone(config) as processes, torch.random.fork_rng(devices=[]), torch.no_grad():
            evaluated = build_evaluated(config, settle_averages(config), processes, self.allowed)
            network, item = evaluated.network, next(iter(evaluated.evaluation.batches()))
            network.module.train()
            losses = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                losses.append(evaluated.evaluation.losses(network)(network.module, item.batch, item.random))
        return not torch.equal(*losses)

    def resumed(self) -> Row:
        """Compare the run with one that was stopped in the middle and continued."""
        whole, middle = self.short_run, self.request.steps // 2
        later = [path.name for path in _checkpoints(whole)[middle:]]
        path = self.folder / "resumed"
        shutil.copytree(whole.path, path, ignore=lambda folder, names: {*later, "report"} & {*names})
        again = RunDir.open(path)
        try:
            train(again, 1, self.allowed)
        except RunFailed as error:  # also a refusal: the trainer accepted these settings before
            return failed(RESUMED, str(error))
        worst, tensors = bitwise(_checkpoints(whole)[-1], _checkpoints(again)[-1])
        compared = f"{tensors} tensors of the state, stopped after step {middle} of {self.request.steps}"
        return Row(RESUMED, worst.difference, 0.0, worst.in_words(compared))

    def exported(self) -> Row:
        """Compare the export of an average with the checkpoint, and its evaluation with that of the run."""
        run_dir = self.short_run
        checkpoint = _checkpoints(run_dir)[-1]
        averages = stored_progress(checkpoint).averages
        weights = f"{AVERAGE}{averages[0]}" if averages else LIVE
        out = parse_out(str(self.folder / "exported.safetensors"))
        options = Options(
            run_dir=run_dir,
            weights=weights,
            out=out,
            step="last",
            dtype="stored",
            max_shard_bytes=parse_size("1000GB"),
            merged=False,
            allowed=list(self.allowed),
        )
        try:
            export(options)
        except ConfigError as error:
            return failed(EXPORTED, f"cannot be exported: {error}")
        wrong = self._differing(out.path, checkpoint, weights)
        if wrong:
            return failed(EXPORTED, f"{wrong} of the export of {weights} is not that of the checkpoint")
        name, recorded, found = self._evaluated(out.path, run_dir, weights)
        difference = abs(found - recorded) / max(abs(recorded), 1e-12)
        detail = (
            f"{name} of {weights}: {found:.9g} from the file, {recorded:.9g} in the run; all tensors bitwise"
        )
        return Row(EXPORTED, difference, METRIC_TOLERANCE, detail)

    def _differing(self, file: Path, checkpoint: Path, weights: str) -> str | None:
        """Return the name of the first tensor that the file lacks or has with other bits than the checkpoint."""
        reader = CheckpointReader(Snapshot(str(checkpoint), checkpoint, weights))
        tensors = load_file(file)
        state = build_plain(self.config.model, self.allowed).state_dict(keep_vars=True)
        groups: dict[int, list[str]] = {}
        for name, value in state.items():
            groups.setdefault(id(value), []).append(name)
        for names in groups.values():
            stored = [name for name in names if name in tensors]
            if not stored:
                return names[0]
            original = next(name for name in names if name in reader.tensors)
            if not identical(tensors[stored[0]], reader.read(original, ())):
                return stored[0]
        return None

    def _evaluated(self, file: Path, run_dir: RunDir, weights: str) -> tuple[str, float, float]:
        """Return the primary metric: its name, its value in the record of the run, and that of the file's weights.

        The file has the BatchNorm statistics of the evaluation, so they are not estimated again.
        """
        config = short(self.config, self.request.steps)
        config = dataclasses.replace(config, ema=dataclasses.replace(config.ema, batchnorm_batches=0))
        with _alone(config) as processes:
            evaluated = build_evaluated(config, settle_averages(config), processes, self.allowed)
            load_model(evaluated.network.module, file)
            values = evaluated.evaluation.evaluate(evaluated.network)
            name = evaluated.task.primary_metric
            found = float(values[name].mean())
        *_, last = records_of(run_dir.metrics_path)
        return name, last[evaluation_key(weights.removeprefix(AVERAGE), name)], found

    def profile(self) -> Row:
        """Compare the weights that each average gives to the steps with the profile of its rule."""
        averages = settle_averages(self.config)
        if not averages:
            return skipped(PROFILE, "the run keeps no average")
        device = choose_device(self.config.trainer.device)
        worst, allowed = Worst(), 0.0
        for name, average in averages.items():
            key = key_of(self.config, name, "rule")
            rule = load_rule(average.rule, self.allowed, key) if average.rule else None
            own = tolerance(average)
            worst.add(deviation(average, rule, self.config.trainer.steps, device) / own, name)
            allowed = own if worst.where == name or not allowed else allowed
        compared = f"{len(averages)} averages through the training loop, each with its start and interval"
        return Row(PROFILE, worst.difference * allowed, allowed, worst.in_words(compared))

    def merged(self) -> Row:
        """Compare a merge of the last checkpoints with the sum in float64, in units of the stored type's rounding."""
        checkpoints = _checkpoints(self.short_run)[-3:]
        text = COEFFICIENTS[len(checkpoints)]
        out = self.folder / "merged.safetensors"
        options = parse_merge([*map(str, checkpoints), f"coefficients={text}", f"out={out}"])
        try:
            merge(options, opened(options))
        except ConfigError as error:
            return failed(MERGED, f"cannot be merged: {error}")
        made = load_file(out)
        readers = [CheckpointReader(Snapshot(str(path), path, None)) for path in checkpoints]
        worst = Worst()
        for name in readers[-1].tensors:
            if name in made:
                parts = [reader.read(name, ()) for reader in readers]
                worst.add(_roundings(made[name], parts, json.loads(text)), name)
            else:
                worst.add(math.inf, name)
        compared = (
            f"{len(checkpoints)} checkpoints with the coefficients {text}, in roundings of the stored type"
        )
        return Row(MERGED, worst.difference, 1.0, worst.in_words(compared))


def _roundings(made: Tensor, parts: Sequence[Tensor], coefficients: Sequence[float]) -> float:
    """Return the largest distance from the sum, in units of the largest rounding error of a sum in float64.

    Integers are those of the last part.
    """
    if not made.is_floating_point():
        return 0.0 if identical(made, parts[-1]) else math.inf
    wide = [part.double() * x for part, x in zip(parts, coefficients, strict=True)]
    total = torch.stack(wide).sum(0)
    info, fine = torch.finfo(made.dtype), torch.finfo(torch.float64).eps
    error = (
        info.eps / 2 * total.abs()
        + 4 * fine * torch.stack(wide).abs().sum(0)
        + info.smallest_normal * info.eps
    )
    return float(((made.double() - total).abs() / error).max()) if made.numel() else 0.0


def _checkpoints(run_dir: RunDir) -> list[Path]:
    """Return the checkpoints of a short run, one of each step."""
    return sorted(committed(run_dir.checkpoints), key=step_of)


@contextmanager
def _alone(config: Config) -> Iterator[Processes]:
    """Join a process group of this process alone, as a run in one process does."""
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    try:
        yield join(config.trainer)
    finally:
        leave()

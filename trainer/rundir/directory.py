"""The directory of one run, made completely or not at all, and opened only with an unchanged config."""

import datetime
import hashlib
import json
import re
import secrets
import string
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.distributed.torchrun import Job
from trainer.errors import ConfigError
from trainer.rundir.circumstances import circumstances, git_state
from trainer.rundir.files import (
    check_free,
    check_own_folder,
    check_yaml,
    made_aside,
    parse_json,
    read_json,
    read_text,
    read_yaml,
    write_atomically,
)
from trainer.rundir.lock import PATIENCE_S, hold

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
META = "meta.json"
METRICS = "metrics.jsonl"
OUTPUTS = Path("outputs")
ORIGIN = "init_from"
"""Entry of `meta.json` with the path, kind and digests of the weights that the run started from."""
FORK = "fork"
"""Entry of `meta.json` with the path, step and digest of the checkpoint that the run was forked from."""

_BASE36 = string.digits + string.ascii_lowercase
_OWN_FOLDERS = ("checkpoints", "snapshots", "report", "samples", "evaluations", "wandb", "tensorboard")
_REQUIRED: dict[str, type] = {"config_sha256": str, "wandb_run_id": str}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "overrides_sha256": str,
    "resumed": list,
    "primary_metric": str,
    "higher_is_better": (list, type(None)),
    "direction_undeclared": list,
    "metric_units": dict,
    "torchrun_agents": list,
    ORIGIN: dict,
    FORK: dict,
}
"""Entries of `meta.json` that the code relies on, with their types."""


def default_run_dir(experiment: str, job: Job | None = None) -> Path:
    """Return a new path `outputs/<UTC date-time>_<experiment>_<6 hex>`; names sort by time.

    The hexadecimal digits keep runs apart that start in the same second.

    Args:
        experiment: name of the experiment; characters that do not suit a file name become `-`.
        job: torchrun command that starts the run, None without torchrun; it sets the digits, so `begun_by` can find
            the directory.
    """
    now = datetime.datetime.now(datetime.UTC)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment)
    return OUTPUTS / f"{now:%Y-%m-%d_%H-%M-%S}_{name}_{job.token if job else secrets.token_hex(3)}"


def is_run_directory(path: Path) -> bool:
    """Return whether a folder has the files of a run directory."""
    return (path / META).is_file() and (path / CONFIG).is_file()


def begun_by(job: Job | None, path: Path | None) -> "RunDir | None":
    """Return the run directory that this torchrun command made before it restarted its processes, else None.

    Nodes that joined the command since then are added to its `meta.json`. Only one process of a run calls this.

    Args:
        job: this torchrun command, None without torchrun.
        path: run directory that the user set; None searches the default names, newest first.

    Raises:
        ConfigError: This command made the directory, but it is damaged or cannot be written.
    """
    if job is None:
        return None
    for place in [path] if path else sorted(OUTPUTS.glob(f"*_{job.token}"), reverse=True):
        try:
            meta = read_json(place / META)
        except (OSError, ConfigError):  # not a complete run directory
            continue
        if not isinstance(meta, dict) or not job.began(meta):
            continue
        run_dir = RunDir.open(place, key="run_dir")
        try:
            run_dir.update_meta(torchrun_agents=sorted({*meta["torchrun_agents"], *job.agents}))
        except OSError as error:
            raise ConfigError(f"run_dir: {place} cannot be written: {error.strerror}") from error
        return run_dir
    return None


class RunDir:
    """A complete run directory; `create` makes one, `open` finds an existing one."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self._meta = meta
        self.config_path = path / CONFIG
        """Path of the frozen config."""
        self.metrics_path = path / METRICS
        """Path of the metrics: one JSON object per logged step."""
        self.checkpoints = path / "checkpoints"
        """Folder of the checkpoints, made by the first save."""
        self.snapshots = path / "snapshots"
        """Folder of the snapshots of the averages, in the format of checkpoints, made by the first."""
        self.evaluations = path / "evaluations"
        """Folder of evaluations by `launch.evaluate`, one JSON file each, made by the first."""
        self.report = path / "report"
        """Folder of the report, made at the end of the run."""

    @classmethod
    def create(
        cls, path: Path | str, *, config_yaml: str, overrides: list[str], meta: dict[str, Any]
    ) -> "RunDir":
        """Make the directory with the config, the overrides and the circumstances of the run in it.

        Only one process of a run calls this. The directory gets its name when it is complete.

        Args:
            path: directory to make, with its parents; must not exist.
            config_yaml: resolved config as YAML.
            overrides: overrides of the command line, as typed.
            meta: further entries of `meta.json` (JSON values), which replace those recorded here. With an entry `git`
                no git command runs; a caller that makes many directories needs it.

        Raises:
            ConfigError: As for `made_aside`.
        """
        path = Path(path).absolute()
        check_free(path, "run_dir")  # before git is asked, which may take seconds
        # JSON strings are valid YAML, so no YAML library is needed.
        listed = "".join(f"- {json.dumps(item, ensure_ascii=False)}\n" for item in overrides) or "[]\n"
        recorded = {
            **circumstances(),
            "config_sha256": sha256_of(config_yaml),
            "overrides_sha256": sha256_of(listed),
            # A resumed run continues the same wandb run.
            "wandb_run_id": "".join(secrets.choice(_BASE36) for _ in range(8)),
            **meta,
        }
        if "git" not in recorded:
            recorded["git"] = git_state()
        with made_aside(path, "run_dir") as aside:
            write_atomically(aside / CONFIG, config_yaml)
            write_atomically(aside / OVERRIDES, listed)
            write_atomically(aside / META, _to_json(recorded))
        return cls(path, recorded)

    @classmethod
    def open(cls, path: Path | str, *, key: str = "resume") -> "RunDir":
        """Open an existing run directory; `key`, for messages, is the config key or argument that has its path.

        Raises:
            ConfigError: `path` is missing, is no run directory, or its config was changed after the run started.
        """
        path = Path(path).absolute()
        if not path.is_dir():
            raise ConfigError(f"{key}: {path} is no directory; expected a run directory")
        texts = {}
        for name in (CONFIG, META):
            try:
                texts[name] = read_text(path / name)
            except FileNotFoundError:
                raise ConfigError(f"{key}: {path} is no run directory: it has no {name}") from None
            except OSError as error:
                raise ConfigError(f"{key}: {path / name} cannot be read: {error.strerror}") from error
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error
        try:
            meta = parse_json(texts[META])
        except ValueError as error:
            raise ConfigError(f"{key}: {path / META} is not JSON: {error}") from error
        if (fault := _fault_of(meta)) is not None:
            raise ConfigError(f"{key}: {path / META} {fault}; restore it from a copy")
        if sha256_of(texts[CONFIG]) != meta["config_sha256"]:
            raise ConfigError(
                f"{key}: {path / CONFIG} was changed after the run started; expected SHA-256 {meta['config_sha256']}"
            )
        return cls(path, meta)

    def saves(self) -> list[Path]:
        """Return what has a checkpoint's name, finished or not."""
        # A save renames what is no checkpoint to step-00000500.stale-1.
        return [path for path in self.checkpoints.glob("step-*") if ".stale-" not in path.name]

    def check_own_folders(self) -> None:
        """Refuse a run directory whose folders or checkpoints are symbolic links, before anything is written.

        Raises:
            ConfigError: A folder is a symbolic link; names it.
        """
        for folder in (*(self.path / name for name in _OWN_FOLDERS), *self.saves()):
            check_own_folder(folder)

    @contextmanager
    def in_use(self, patience_s: float = PATIENCE_S, key: str = "resume") -> Iterator[bool]:
        """Hold the lock of the directory, so that only one session works in it; for one process per run.

        Arguments and yielded value as for `trainer.rundir.lock.hold`.

        Raises:
            ConfigError: Another process holds the lock, another session continued the run since it was opened, or the
                directory cannot be written.
        """
        with hold(self.path, patience_s, key) as has_locks:
            if RunDir.open(self.path).meta.get("resumed") != self._meta.get("resumed"):
                raise ConfigError(f"{key}: {self.path} was continued by another session meanwhile; try again")
            yield has_locks

    @property
    def meta(self) -> dict[str, Any]:
        """Copy of the entries of `meta.json`."""
        return dict(self._meta)

    def latest_config(self) -> str:
        """Return the configuration of the latest session as YAML; a resumed run starts from it. It is not trusted.

        Raises:
            ConfigError: A session in `meta.json` is incomplete or was changed, or the text is refused by `check_yaml`.
        """
        sessions = self._sessions()
        path = self.path / META if sessions else self.config_path
        text: str = sessions[-1]["config"] if sessions else read_text(path)
        try:
            check_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{path}: expected the configuration as YAML ({error})") from error
        return text

    def config_digests(self) -> set[str]:
        """Return the SHA-256 of the configuration of each session so far.

        Raises:
            ConfigError: As for `latest_config`.
        """
        return {
            self._meta["config_sha256"],
            *(sha256_of(session["config"]) for session in self._sessions()),
        }

    def check_overrides(self) -> None:
        """Check that `overrides.yaml` and `meta.json` still have the overrides of all sessions.

        Raises:
            ConfigError: `overrides.yaml` is missing or was changed, or as for `latest_config`.
        """
        self._sessions()
        path = self.path / OVERRIDES
        try:
            text = read_text(path)
            overrides = read_yaml(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; restore it from a copy") from error
        expected = self._meta.get("overrides_sha256")
        if not _is_list_of_texts(overrides) or expected not in (None, sha256_of(text)):
            raise ConfigError(
                f"{path} was changed after the run started; expected the overrides of its first session"
            )

    def _sessions(self) -> list[dict[str, Any]]:
        """Return the sessions after the first one, checked."""
        sessions: list[dict[str, Any]] = self._meta.get("resumed", [])
        for number, session in enumerate(sessions, start=2):
            if (fault := _fault_of_session(session)) is not None:
                raise ConfigError(
                    f"{self.path / META}: session {number} {fault}; restore the file from a copy"
                )
        return sessions

    def record_session(
        self, config_yaml: str, *, overrides: list[str], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record a session that continues the run in `meta.json`. Only one process of a run calls this.

        The config is resolved, the overrides are as typed. `facts` are further entries of `meta.json` that the session
        changes, such as `higher_is_better`.

        Raises:
            ConfigError: `meta.json` cannot be written.
        """
        entry = {
            "overrides": overrides,
            "config": config_yaml,
            "config_sha256": sha256_of(config_yaml),
            "overrides_sha256": sha256_of(json.dumps(overrides)),
            "argv": list(sys.argv),
        }
        try:
            self.update_meta(**(facts or {}), resumed=[*self._meta.get("resumed", []), entry])
        except OSError as error:
            raise ConfigError(f"resume: {self.path} cannot be written: {error.strerror}") from error

    def update_meta(self, **entries: Any) -> None:
        """Set entries of `meta.json` (JSON values) atomically. Only one process of a run calls this."""
        meta = {**self._meta, **entries}
        write_atomically(self.path / META, _to_json(meta), make_folder=False)
        self._meta = meta


def _to_json(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=2) + "\n"


def _fault_of(meta: Any) -> str | None:
    """Return what is wrong with the content of a `meta.json`; None if it is as a session wrote it."""
    if not isinstance(meta, dict):
        return "is no JSON object"
    for name, kind in _REQUIRED.items():
        if not isinstance(meta.get(name), kind):
            return f"has no {name}"
    for name, kinds in _OPTIONAL.items():
        if name in meta and not isinstance(meta[name], kinds):
            return f"has a wrong {name}"
    return None


def _fault_of_session(session: Any) -> str | None:
    if not isinstance(session, dict) or not isinstance(session.get("config"), str):
        return "has no configuration"
    if not _is_list_of_texts(session.get("overrides")):
        return "has no overrides"
    overrides = json.dumps(session["overrides"])
    for name, text in (("config", session["config"]), ("overrides", overrides)):
        # Sessions of earlier versions have no digest.
        if session.get(f"{name}_sha256", expected := sha256_of(text)) != expected:
            return f"was changed after it started: its {name} does not have its SHA-256"
    return None


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def sha256_of(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

"""`launch=print launch.format=…`: a run as a Kubeflow TrainJob or as a SkyPilot task, in YAML. Imports no torch."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from launch.sweeps.backends.base import SIGNALS, shutdown_timeout
from launch.sweeps.config import LaunchConfig, gpus_of
from trainer.distributed.torchrun import RESTARTS
from trainer.errors import ConfigError
from trainer.rundir.directory import META
from trainer.shell.commands import SCRIPT, shell_quoted

RENDEZVOUS_PORT = 29400
"""Port of the first node at which torchrun's processes meet under SkyPilot."""


def check_manifest(launch: LaunchConfig, device: str, sweep_dir: str | None) -> None:
    """Refuse settings, with `sweep_dir` as typed, from which no usable manifest can be made.

    Raises:
        ConfigError: A value is missing; the message names its key.
    """
    where = f"for launch.format={launch.format}"
    if sweep_dir is None or not sweep_dir.startswith("/"):
        raise ConfigError(
            f"sweep_dir: expected an absolute path on a disk that all nodes share and that outlives them, {where},"
            f" got {sweep_dir!r}"
        )
    if launch.format == "trainjob" and launch.image is None:
        raise ConfigError(
            f"launch.image: expected a container image with polyak installed, {where}, got None"
        )
    if launch.format == "skypilot" and launch.gpu_type is None and gpus_of(launch, device):
        raise ConfigError(f"launch.gpu_type: expected a name of SkyPilot such as H100, {where}, got None")


def manifest(
    launch: LaunchConfig, device: str, name: str, run_dir: str, begin: Sequence[str], resume: Sequence[str]
) -> str:
    """Return the YAML document of one run.

    Args:
        launch: settings of the start.
        device: `trainer.device` of the run.
        name: name of the sweep and number of the run in it.
        run_dir: run directory.
        begin: arguments of `polyak train` that begin the run; empty if it has begun already.
        resume: arguments that continue it.
    """
    shown = re.sub(r"[^a-z0-9]+", "-", name.lower())[-32:].strip("-")
    make = _trainjob if launch.format == "trainjob" else _skypilot
    document = make(launch, device, f"{SCRIPT}-{shown}", _arguments(run_dir, begin, resume))
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)


def _arguments(run_dir: str, begin: Sequence[str], resume: Sequence[str]) -> list[str]:
    """Return the shell lines that choose the arguments: a job that is started again continues its run."""
    if not begin:
        return [f"set -- {shell_quoted(resume)}"]
    return [
        f"if [ -f {shell_quoted([f'{run_dir}/{META}'])} ]; then",
        f"  set -- {shell_quoted(resume)}",
        "else",
        f"  set -- {shell_quoted(begin)}",
        "fi",
    ]


def _start(launch: LaunchConfig, meeting: Sequence[str], processes: str) -> str:
    """Return the shell line that starts the processes of one node."""
    if launch.nodes * launch.processes_per_node == 1:
        return f'exec {SCRIPT} train "$@"'
    words = [f"--nnodes={launch.nodes}", f"--nproc-per-node={processes}", *meeting, SIGNALS, "--no-python"]
    return " ".join(["exec torchrun", *words, SCRIPT, 'train "$@"'])


def _environment(launch: LaunchConfig) -> dict[str, str]:
    return dict([shutdown_timeout(launch), (RESTARTS, "1")])


def _trainjob(launch: LaunchConfig, device: str, name: str, arguments: list[str]) -> dict[str, Any]:
    # The runtime sets PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, which torchrun reads.
    script = "\n".join([*arguments, _start(launch, [], str(launch.processes_per_node))]) + "\n"
    script = re.sub(r"\$(?=[$(])", "$$", script)  # Kubernetes replaces $(NAME), and $$ by $
    amounts = {
        "cpu": launch.cpus_per_process * launch.processes_per_node,
        "memory": f"{launch.mem_gib}Gi" if launch.mem_gib else None,
        "nvidia.com/gpu": gpus_of(launch, device) or None,
    }
    resources = {key: value for key, value in amounts.items() if value}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": launch.runtime},
            "trainer": {
                "image": launch.image,
                "command": ["bash", "-c"],
                "args": [script],
                "numNodes": launch.nodes,
                "numProcPerNode": launch.processes_per_node,
                "resourcesPerNode": {"requests": resources, "limits": resources},
                "env": [{"name": key, "value": value} for key, value in _environment(launch).items()],
            },
        },
    }


def _skypilot(launch: LaunchConfig, device: str, name: str, arguments: list[str]) -> dict[str, Any]:
    gpus = gpus_of(launch, device)
    processes = str(launch.processes_per_node)
    if gpus == launch.processes_per_node:
        processes = '"$SKYPILOT_NUM_GPUS_PER_NODE"'
    meeting = [
        '--node-rank="$SKYPILOT_NODE_RANK"',
        '--master-addr="$(head -n1 <<< "$SKYPILOT_NODE_IPS")"',
        f"--master-port={RENDEZVOUS_PORT}",
    ]
    resources = {
        "accelerators": f"{launch.gpu_type}:{gpus}" if gpus else None,
        "cpus": f"{launch.cpus_per_process * launch.processes_per_node}+",
        "memory": f"{launch.mem_gib}+" if launch.mem_gib else None,
        "image_id": f"docker:{launch.image}" if launch.image else None,
    }
    return {
        "name": name,
        "num_nodes": launch.nodes,
        "resources": {key: value for key, value in resources.items() if value},
        "envs": _environment(launch),
        **({"setup": "\n".join(launch.setup) + "\n"} if launch.setup else {}),
        "run": "\n".join([*arguments, _start(launch, meeting, processes)]) + "\n",
    }


class _Dumper(yaml.SafeDumper):
    """Writer that shows a text of several lines as it is, and one value at each place without references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

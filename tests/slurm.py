"""A real Slurm cluster of two virtual nodes on this machine: munged, slurmctld and two slurmd, for the tests alone.

Needs root and Debian's packages `slurm-wlm` and `munge`; nothing of an installed cluster is touched: own folder, own
ports, own key.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "runuser")
NODES = ("n1", "n2")
READY_TIMEOUT_S = 60

SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={ctld_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ReturnToService=2
KillWait=60
JobRequeue=1
MpiDefault=none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here, empty if one can."""
    lacking = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "needs root to start munged, slurmctld and slurmd"


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Start the cluster; gives the environment variables by which Slurm's commands find it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    with ExitStack() as ends:
        ends.callback(shutil.rmtree, folder, ignore_errors=True)
        _start_munge(folder, ends)
        _write_settings(folder)
        daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
        for number, command in enumerate(daemons):
            log = ends.enter_context((folder / f"daemon-{number}.log").open("w"))
            daemon = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
            ends.callback(_end, daemon)
        _wait_until_idle(environment, folder)
        yield environment


def _start_munge(folder: Path, ends: ExitStack) -> None:
    # munged insists that nobody else may write near its key, and everybody reach its socket.
    folder.chmod(0o755)
    private, reachable = folder / "munge", folder / "munge" / "socket"
    private.mkdir()
    reachable.mkdir()
    (private / "key").write_bytes(secrets.token_bytes(1024))
    (private / "key").chmod(0o400)
    private.chmod(0o755)
    for path in (private, reachable, private / "key"):
        shutil.chown(path, "munge", "munge")
    daemon = subprocess.Popen(
        [
            *("runuser", "-u", "munge", "--", "munged", "--foreground", f"--key-file={private / 'key'}"),
            *(f"--socket={reachable / 'munge'}", f"--pid-file={private / 'pid'}"),
            *(f"--log-file={private / 'log'}", f"--seed-file={private / 'seed'}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends.callback(_end, daemon)
    _wait(lambda: (reachable / "munge").exists(), "munged has no socket")


def _write_settings(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(1 + len(NODES))
    text = SETTINGS.format(host=host, folder=folder, ctld_port=ports[0])
    for node, port in zip(NODES, ports[1:], strict=True):
        (folder / f"spool-{node}").mkdir()
        text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN\n"
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in bound:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in bound]


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    def idle() -> bool:
        asked = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return asked.stdout.split() == ["idle"] * len(NODES)

    try:
        _wait(idle, "the nodes are not idle")
    except TimeoutError as error:
        logs = {path.name: path.read_text()[-800:] for path in folder.glob("*.log")}
        raise TimeoutError(f"{error}: {logs}") from error


def _wait(condition: object, complaint: str) -> None:
    # Slurm tells nobody when it is ready, so it is asked.
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {READY_TIMEOUT_S} s {complaint}")
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

"""A run over two nodes: two torchruns with a rendezvous of their own, and two hosts whose cable is pulled.

A host is a network namespace here; the two are joined by a veth pair. Expected numbers are those of a run that nobody
disturbed; on the other number of ranks that finishes one of them, to rounding.
"""

import os
import secrets
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.commands import TIMEOUT_S, Warm, environment, free_port, last, records
from tests.makers import TINY_GPT

TIMEOUT_OF_A_WAIT_S = 10
BOUND_S = 60
"""From the cut to the end of both jobs: a wait, what the kernel needs to give up a connection, and a slow machine."""
STEPS = 16
RUN = (
    *TINY_GPT,
    "ema=bank",
    "ema.decays=[0.9,0.99]",
    "sharding=fsdp",
    f"trainer.steps={STEPS}",
    "trainer.log_every=1",
    "trainer.save_every=2",
)
KEYS = ("eval/live/loss", "eval/ema/0.9/loss", "eval/ema/0.99/loss")


def node(endpoint: str, host: bool, *overrides: str, launcher: Sequence[str] = ()) -> list[str]:
    """The command line of README on one of two nodes."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=job1"),
        *(f"--rdzv-conf=is_host={int(host)}", *launcher, "-m", "trainer", *overrides),
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for all; exit code and output of each."""
    try:
        return [(process.wait(TIMEOUT_S), process.communicate()[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def start(command: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment({"PYTHONUNBUFFERED": "1", **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_agents_with_their_own_rendezvous_agree_with_one_process_to_1e_4(
    tmp_path: Path, warm: Warm
) -> None:
    run = (*RUN, "trainer.steps=20", "trainer.save_every=0")
    warm(*run, "sharding=none", "run_dir=one", cwd=tmp_path)
    endpoint = f"localhost:{free_port()}"
    nodes = [start(node(endpoint, k == 0, *run, "run_dir=two"), tmp_path) for k in range(2)]
    ended = end(nodes)
    for code, printed in ended:
        assert code == 0, printed
    # What to type next is for as many nodes, with the place to meet left to whoever types it.
    again = (
        "  torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 --rdzv-id=JOB"
        " -m trainer resume=two trainer.steps=40  # on each of the 2 nodes; "
    )
    assert sum(again in printed for _, printed in ended) == 1
    one, two = tmp_path / "one", tmp_path / "two"
    assert last(two, KEYS) == pytest.approx(last(one, KEYS), abs=1e-4)
    losses = [[record["train/loss"] for record in records(path)] for path in (one, two)]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    live, short, long = last(one, KEYS)
    assert min(abs(live - short), abs(short - long)) > 1e-3


@dataclass
class Cable:
    """Two network namespaces and the veth pair between them."""

    hosts: tuple[str, str]
    links: tuple[str, str]
    addresses = ("10.77.0.1", "10.77.0.2")

    def cut(self) -> None:
        ip("-n", self.hosts[0], "link", "set", self.links[0], "down")

    def start(self, host: int, cwd: Path, *overrides: str) -> subprocess.Popen[str]:
        launcher = (f"--local-addr={self.addresses[host]}",)
        command = node(f"{self.addresses[0]}:29400", host == 0, *overrides, launcher=launcher)
        return start(
            ["ip", "netns", "exec", self.hosts[host], *command],
            cwd,
            GLOO_SOCKET_IFNAME=self.links[host],
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None:
        pytest.skip("needs ip of the package iproute2")
    if os.geteuid() != 0:
        pytest.skip("needs root to make network namespaces")
    name = secrets.token_hex(3)
    made = Cable((f"polyak-a{name}", f"polyak-b{name}"), (f"pa{name}", f"pb{name}"))
    try:
        try:
            for host in made.hosts:
                ip("netns", "add", host)
            ip("link", "add", made.links[0], "type", "veth", "peer", "name", made.links[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for host, link, address in zip(made.hosts, made.links, made.addresses, strict=True):
            ip("link", "set", link, "netns", host)
            ip("-n", host, "addr", "add", f"{address}/30", "dev", link)
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", link, "up")
            # A torchrun that asks the other node's store waits until the kernel gives up: 15 minutes by default.
            ip("netns", "exec", host, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
        yield made
    finally:
        for host in made.hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def read_until_step(step: int, run_dir: Path, nodes: list[subprocess.Popen[str]]) -> list[str]:
    """Read what the nodes print until a step is on record; what each printed so far."""
    printed = [""] * len(nodes)
    with selectors.DefaultSelector() as ready:
        for place, process in enumerate(nodes):
            assert process.stdout is not None
            ready.register(process.stdout, selectors.EVENT_READ, place)
        while not any(record["train/step"] >= step for record in records(run_dir)):
            for key, _ in ready.select(TIMEOUT_S):
                line = key.fileobj.readline()  # type: ignore[union-attr]
                assert line, printed
                printed[key.data] += line
    return printed


def test_a_cut_cable_ends_both_jobs_in_time_and_the_run_goes_on_to_the_same_result(
    cable: Cable, tmp_path: Path, warm: Warm
) -> None:
    run = (*RUN, "trainer.steps=1000", f"trainer.timeout_s={TIMEOUT_OF_A_WAIT_S}")
    nodes = [cable.start(host, tmp_path, *run, "run_dir=parts") for host in range(2)]
    try:
        before = read_until_step(6, tmp_path / "parts", nodes)
        cable.cut()
        cut_at = time.monotonic()
        outcomes = end(nodes)
    finally:
        for process in nodes:
            process.kill()
    assert time.monotonic() - cut_at < TIMEOUT_OF_A_WAIT_S + BOUND_S
    for (code, rest), beginning in zip(outcomes, before, strict=True):
        printed = beginning + rest
        assert code != 0, printed
        (line,) = (line for line in printed.splitlines() if line.startswith(("error: rank ", "rank ")))
        # Whichever gives up first: the run's own limit, or the kernel's for a peer that does not answer.
        assert (
            f"waited {TIMEOUT_OF_A_WAIT_S} s (trainer.timeout_s)" in line or "lost the other ranks" in line
        ), printed
        assert "[rank" not in printed
    # One of the nodes is enough to go on. Two ranks become one, so the same result means the same to rounding.
    steps = records(tmp_path / "parts")[-1]["train/step"] + 4
    warm("resume=parts", "sharding=none", f"trainer.steps={steps}", cwd=tmp_path)
    warm(*run, f"trainer.steps={steps}", "run_dir=whole", cwd=tmp_path, ranks=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert last(parts, KEYS) == pytest.approx(last(whole, KEYS), abs=1e-4)
    losses = [[record["train/loss"] for record in records(path)] for path in (whole, parts)]
    assert len(losses[0]) == steps
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)

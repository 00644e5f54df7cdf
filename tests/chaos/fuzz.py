"""Read damaged and hostile files with every reader.

Each input is a valid file with edits of hypothesis, or bytes, or JSON of its own. A reader may accept it, or refuse it
in one line of a `ConfigError`, within two seconds. Anything else is wrong. A file of a
checkpoint gets a matching entry in COMMIT.json, so that its checksum does not refuse it first.
"""

import json
import logging
import random
import resource
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from tests.chaos.ledger import Counts, Trial
from tests.makers import make_run_dir, save_checkpoint
from tests.unit.test_files_untrusted import READERS
from trainer.config.frozen import thaw
from trainer.config.schema import InitConfig
from trainer.data.decoding import read_rgb
from trainer.data.tokens import TokenFile
from trainer.errors import ConfigError, blamed_on
from trainer.rundir.directory import RunDir
from trainer.weights.load import start_from

LIMIT_S = 2.0
MEMORY_BYTES = 6 << 30
"""Address space of a process that reads hostile files."""
EXAMPLES = 200
"""Inputs of one reader in one round."""
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["../x", "/etc/passwd", "${oc.env:HOME}", "\x1b[2J", "step-00000004"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def make_files(folder: Path) -> RunDir:
    """Make a run directory with every file that the readers read, an image and two token files."""
    run = make_run_dir(folder / "run", "trainer:\n  steps: 4\nema:\n  decays: [0.9]\n", world_size=1, nodes=1)
    run.metrics_path.write_text('{"train/step": 1, "train/loss": 2.5}\n{"train/step": 2}\n')
    state = {"w": torch.ones(4), "progress": {"step": 4, "skipped": 0, "averages": []}}
    save_checkpoint(run.checkpoints, 4, state, keep=1)
    job = {"run_dir": "0", "number": 0, "overrides": [], "state": "done", "steps": 4, "step": 4}
    (run.path / "sweep.json").write_text(json.dumps({"jobs": [job], "launch": {"name": "local"}}))
    (run.path / "attempts.json").write_text(json.dumps([{"exit_code": 0, "stopped": False}]))
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        Image.fromarray(pixels).save(run.path / f"image.{kind}", kind)
    np.arange(64, dtype=np.uint16).tofile(run.path / "tokens.bin")
    np.save(run.path / "tokens.npy", np.arange(64, dtype=np.uint16))
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    save_file(weights, run.path / "w.safetensors")
    torch.save({"model": weights, "step": 3}, run.path / "w.pt")
    index = {"weight_map": dict.fromkeys(weights, "w.safetensors")}
    (run.path / "w.safetensors.index.json").write_text(json.dumps(index))
    return run


def read_weights(name: str) -> Callable[[RunDir], object]:
    """Return a reader of a file of weights that a run may start from."""
    return lambda run: start_from(str(run.path / name), InitConfig(), torch.nn.Linear(2, 2))


def read_image(name: str) -> Callable[[RunDir], object]:
    """Return a reader of an image of the run directory, with the errors as the data set has them."""

    def read(run: RunDir) -> object:
        with blamed_on("data.path"):
            return read_rgb(str(run.path / name))

    return read


def read_tokens(name: str) -> Callable[[RunDir], object]:
    """Return a reader of a token file of the run directory."""

    def read(run: RunDir) -> object:
        return TokenFile(str(run.path / name), 4, "uint16", "data.train_path").check(1 << 24)

    return read


def all_readers() -> dict[str, tuple[str, Callable[[RunDir], object]]]:
    """Return the name of a file and the function that reads it, by the name of the reader."""
    images = {f"image {kind}": f"image.{kind}" for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")}
    return {
        **READERS,
        "frozen configuration": ("config.yaml", lambda run: thaw(RunDir.open(run.path).latest_config())),
        **{name: (file, read_image(file)) for name, file in images.items()},
        "tokens": ("tokens.bin", read_tokens("tokens.bin")),
        **{
            f"weights {file}": (file, read_weights(file))
            for file in ("w.safetensors", "w.pt", "w.safetensors.index.json")
        },
        "npy tokens": ("tokens.npy", read_tokens("tokens.npy")),
    }


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return inputs that are near a valid file, or JSON, or any bytes."""
    piece = st.binary(max_size=6) | st.sampled_from(
        [b"\xff" * 8, b"\0" * 8, b"-1", b"1e999", b"[[[[", b"*a", b"&a "]
    )
    edits = st.lists(st.tuples(st.integers(0, len(valid)), st.integers(0, 8), piece), min_size=1, max_size=4)

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        text = valid
        for place, removed, added in changes:
            text = text[:place] + added + text[place + removed :]
        return text

    inputs = edits.map(apply) | st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
    if valid[:1] in (b"{", b"["):
        inputs |= st.tuples(st.integers(0, 99), JSON).map(lambda change: _with_other_value(valid, *change))
    return inputs


def _with_other_value(valid: bytes, number: int, value: Any) -> bytes:
    document = json.loads(valid.splitlines()[0] if valid.count(b"\n{") else valid)
    nodes = [document]
    for node in nodes:
        children = node.values() if isinstance(node, dict) else node
        nodes.extend(child for child in children if isinstance(child, dict | list) and child)
    node = nodes[number % len(nodes)]
    keys = list(node) if isinstance(node, dict) else range(len(node))
    if keys:
        node[keys[number % len(keys)]] = value
    return json.dumps(document).encode()


def fuzz(run: RunDir, reader: str, round_seed: int, counts: Counter[str]) -> list[str]:
    """Give one reader `EXAMPLES` inputs; count them and return what went wrong."""
    name, read = all_readers()[reader]
    path, wrong = run.path / name, list[str]()
    valid = path.read_bytes()
    marker = run.checkpoints / "step-00000004" / "COMMIT.json"
    commit = marker.read_bytes()

    @seed(round_seed)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(valid))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        if path.parent == marker.parent and path != marker:
            entry = json.loads(commit)
            entry["files"][path.name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
            marker.write_text(json.dumps(entry))
        began = time.perf_counter()
        try:
            read(run)
            counts["accepted"] += 1
        except ConfigError as error:
            counts["refused"] += 1
            if "\n" in str(error):
                wrong.append(f"{reader}: more than one line for {data!r}")
        except Exception:
            wrong.append(f"{reader}: {data!r}\n{traceback.format_exc()}")
        if time.perf_counter() - began > LIMIT_S:
            wrong.append(f"{reader}: more than {LIMIT_S} s for {data!r}")

    check()
    path.write_bytes(valid)
    marker.write_bytes(commit)
    return wrong


def fuzz_reader(chance: random.Random, *, reader: str) -> Counts:
    """Give one reader the inputs of one round."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")  # Pillow's, about each damaged image
    logging.disable()
    counts = Counter[str]()
    wrong = fuzz(make_files(Path.cwd()), reader, chance.randrange(2**32), counts)
    return Counts({"harmless": counts["accepted"], "refused": counts["refused"], "wrong": len(wrong)}, wrong)


def trials(count: int, references: Path, short: bool) -> Iterator[Trial]:
    """Yield one round of each reader after the other; a round has `EXAMPLES` inputs."""
    readers = sorted(all_readers())
    for number in range(count):
        reader = readers[number % len(readers)]
        name = f"{number // len(readers)} {reader}"
        yield Trial(
            "fuzz", f"inputs of {len(readers)} readers of files", name, partial(fuzz_reader, reader=reader)
        )

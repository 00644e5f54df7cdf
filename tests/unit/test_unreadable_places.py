"""A lock file and a checkpoints folder that must not be read: refused in one line, never taken for absent.

While a run saves, such a folder is no reason to end it: old checkpoints are kept.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

from tests.forked import FURTHER_IMPORTS

TRIED = """
import sys
from pathlib import Path
from tests.chaos.damage import obey_modes
from trainer.checkpoint.places import prune
from trainer.rundir.checkpoints import committed
from trainer.errors import ConfigError
from trainer.rundir.lock import held_by, is_file_locked, torchrun_of

obey_modes()
run = Path(sys.argv[1])
for call, place in [
    (committed, run / "checkpoints"),
    (held_by, run),
    (torchrun_of, run),
    (is_file_locked, run / "run.lock"),
]:
    try:
        print("taken for", call(place))
    except ConfigError as error:
        print(error)
print(*prune(run / "checkpoints", run / "checkpoints" / "step-00000002", 1))
"""


def test_each_is_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(mode=0)
    (tmp_path / "run.lock").touch(mode=0)

    words = [sys.executable, "-c", TRIED, str(tmp_path)]
    variables = {**os.environ, FURTHER_IMPORTS: "torch"}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=100, check=True)

    (tmp_path / "checkpoints").chmod(stat.S_IRWXU)
    named = [tmp_path / name for name in ("checkpoints", "run.lock", "run.lock", "run.lock")]
    refused = [f"{path} cannot be read (Permission denied)" for path in named]
    assert done.stdout.splitlines() == [*refused, f"warning: old checkpoints are kept: {refused[0]}"]

"""Commands to print for the user, quoted for Hydra and for the shell. Nothing here imports torch.

A printed command works when it is pasted into the shell in which this process was started. It names the program that
started this process: `polyak` or `python -m`.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = {
    "train": "trainer",
    "sweep": "launch",
    "status": "launch.status",
    "retry": "launch.retry",
    "plan": "launch.plan",
    "compare": "launch.compare",
    "evaluate": "launch.evaluate",
    "export": "launch.export",
    "posthoc": "launch.posthoc",
    "merge": "launch.merge",
    "certify": "launch.certify",
    "prune": "launch.prune",
    "tokenize": "trainer.data.tokenize",
}
"""Module of each subcommand of `polyak`."""
SCRIPT = "polyak"
_COMPOSITION_FLAGS = re.compile(r"(--config-dir|-cd|--config-name|-cn|--config-path|-cp)(=.*)?", re.DOTALL)
_BARE = re.compile(r"[A-Za-z0-9_/.-]+")
_NEEDS_ESCAPE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def hydra_quoted(value: str) -> str:
    """Return a text as Hydra's grammar reads it back: as it is, or in single quotes."""
    if _BARE.fullmatch(value) and not _is_other_type(value):
        return value
    # Hydra reads a backslash literally unless a quote follows it.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _is_other_type(value: str) -> bool:
    """Return whether Hydra would read the text as a number, a truth value or null."""
    if value.lower() in ("null", "true", "false"):
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True


def shell_quoted(words: Sequence[str]) -> str:
    """Return words as one line for bash or zsh, without control characters."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if _NEEDS_ESCAPE.search(word):
        escaped = word.replace("\\", "\\\\").replace("'", "\\'")
        return "$'" + _NEEDS_ESCAPE.sub(lambda found: _octal(found[0]), escaped) + "'"
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'  # easier to read than what shlex makes of single quotes
    return shlex.quote(word)


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode())


def path_argument(path: Path) -> str:
    """Return a path relative to the working directory that no command reads as a flag or as KEY=VALUE."""
    relative = os.path.relpath(path)
    return os.path.join(".", relative) if relative.startswith("-") or "=" in relative else relative


def command(name: str, *arguments: str) -> str:
    """Return the line that starts a command, such as `compare`, with these arguments."""
    return shell_quoted([*_start(name), *arguments])


def train_command(overrides: Sequence[str], world_size: int = 1, nodes: int = 1) -> str:
    """Return the line that starts a training run in `world_size` processes on `nodes` machines.

    For several machines the line ends with a shell comment that names what the user must fill in.
    """
    if world_size == 1:
        return command("train", *overrides)
    comment = f"  # on each of the {nodes} nodes; HOST: one of them, JOB: any name" if nodes > 1 else ""
    return shell_quoted([*torchrun_words("train", world_size, nodes), *overrides]) + comment


def torchrun_words(name: str, world_size: int, nodes: int) -> list[str]:
    """Return the words that start a command in several processes.

    For several nodes, the user must replace HOST by the name of one of them, and JOB by any name.
    """
    arguments = torchrun_arguments(world_size // nodes, nodes)
    job = ["--rdzv-id=JOB"] if nodes > 1 else []
    return [*_torchrun(), *arguments, *job, *_under_torchrun(_start(name))]


def typed_form(words: Sequence[str]) -> str:
    """Return the words of a run that this project starts as one line, with short names for programs on the path."""
    at = words.index("trainer") - 1  # of the -m before it
    torchrun, overrides = words[3:at], words[at + 2 :]
    python = _short("python")
    program = [_short(SCRIPT), "train"] if _by_script() else [python, "-m", "trainer"]
    if not torchrun:
        return shell_quoted([*program, *overrides])
    start = ["torchrun"] if _on_path("torchrun") else [python, "-m", "torch.distributed.run"]
    return shell_quoted([*start, *torchrun, *_under_torchrun(program), *overrides])


def _under_torchrun(program: list[str]) -> list[str]:
    # --no-python: torchrun starts the script itself, so no folder of the user can hide our modules.
    return ["--no-python", *program] if _by_script() else program[1:]


def torchrun_arguments(processes_per_node: int, nodes: int) -> list[str]:
    """Return the arguments of torchrun for this many processes.

    With several nodes, the user must replace `HOST` by the name of one node.
    """
    each = f"--nproc-per-node={processes_per_node}"
    if nodes == 1:
        return [each]
    return [f"--nnodes={nodes}", each, "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29400"]


def named_as_used(text: str) -> str:
    """Return a help text with the commands named as the user names them: by `polyak` if that was used."""
    if not _by_script():
        return text
    for name, module in sorted(MODULES.items(), key=lambda item: -len(item[1])):
        text = text.replace(f"python -m {module}", f"{SCRIPT} {name}")
        text = re.sub(rf"(torchrun .*?)-m {re.escape(module)} ", rf"\1--no-python {SCRIPT} {name} ", text)
    return text


def composition_flags(argv: Sequence[str] | None = None) -> list[str]:
    """Return the flags of a command line that choose its configuration files, such as --config-dir=FOLDER.

    Each is one word with its value, so that no value is compared or dropped apart from its flag. The first word of
    `argv` is the program; None takes the command line of this process.
    """
    flags: list[str] = []
    arguments = iter((sys.argv if argv is None else argv)[1:])
    for argument in arguments:
        if (flag := _COMPOSITION_FLAGS.fullmatch(argument)) is not None:
            value = next(arguments, None) if flag[2] is None else None
            flags.append(argument if value is None else f"{argument}={value}")
        elif argument.lstrip("+").startswith("hydra.searchpath="):
            flags.append(argument)
    return flags


def command_lines(title: str, commands: Sequence[str]) -> list[str]:
    """Return a title and commands, one a line; the first activates this process's virtual environment, if needed."""
    activation = _activation()
    return [title, *(f"  {line}" for line in ([activation] if activation else []) + list(commands))]


def trust(allowed: Sequence[str]) -> list[str]:
    """Return the override that allows targets with these prefixes; none if there are no prefixes."""
    return [f"allow_targets=[{','.join(map(hydra_quoted, allowed))}]"] if allowed else []


def _start(name: str) -> list[str]:
    return [_program(SCRIPT), name] if _by_script() else [_program("python"), "-m", MODULES[name]]


def _torchrun() -> list[str]:
    has_script = os.path.exists(_beside_python("torchrun"))
    if has_script and not os.path.isabs(_program("torchrun")):
        return ["torchrun"]
    return [_program("python"), "-m", "torch.distributed.run"]


def _by_script() -> bool:
    return Path(sys.argv[0]).name == SCRIPT


def _program(name: str) -> str:
    """Return a program's name if the shell finds that of this Python, or will after `_activation`; else its path."""
    return name if _activation() else _short(name)


def _short(name: str) -> str:
    """Return a program's name if the shell finds that of this Python, else its path."""
    if _on_path(name):
        return name
    return sys.executable if name == "python" else _beside_python(name)


def _beside_python(name: str) -> str:
    return os.path.join(os.path.dirname(sys.executable), name)


def _on_path(name: str) -> bool:
    found = shutil.which(name)
    return found is not None and os.path.dirname(os.path.abspath(found)) == os.path.dirname(sys.executable)


def _activation() -> str | None:
    """Return the command that activates this process's virtual environment; None if it is active or there is none."""
    if sys.prefix == sys.base_prefix or _on_path("python"):
        return None
    script = Path(sys.prefix) / "bin" / "activate"
    if not script.is_file():
        return None
    near = script.is_relative_to(Path.cwd())
    return shell_quoted(["source", os.path.relpath(script) if near else str(script)])

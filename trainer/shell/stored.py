"""Decide which stored words of a command line may be part of a printed command. Nothing here imports torch or Hydra.

A record of a run or a sweep may come from a stranger. What a user types is trusted (`trainer.config.trust`), so a
printed command repeats a stored word only if it cannot name code, a command, another folder of configurations, or an
interpolation; or if this process was started with the same word.
"""

import re
import sys
from collections.abc import Sequence

from trainer.shell.commands import composition_flags

TRUSTED_IF_TYPED = re.compile(
    r"_target_|allow_targets|on_checkpoint|hydra|\brule\b|\$\{|^-|launch\.(setup|sbatch|image)|launch=\{"
    r"|trust_remote_code|allow_all_kernels|megatron_core|weights_only",
)
"""Pattern of words that are trusted because they were typed."""


def may_be_printed(words: Sequence[str]) -> bool:
    """Return whether stored overrides and flags may be printed for the user to type again.

    A flag is one word with its value, as `composition_flags` returns it.
    """
    typed = {*sys.argv[1:], *composition_flags()}
    return all(word in typed or not TRUSTED_IF_TYPED.search(word) for word in words)

"""What README shows to type is quoted for zsh, which refuses bare brackets, braces and stars."""

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_values_with_brackets_braces_or_stars_are_quoted() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    words = [line for block in blocks for line in block.splitlines()]
    words += re.findall(
        r"`([^`\n]*=[^`\n]*)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    )
    assert any("ema.decays" in word for word in words)
    for typed in words:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", typed)
        assert not re.search(r"[\w.]+=\S*[\[{*]", bare), typed

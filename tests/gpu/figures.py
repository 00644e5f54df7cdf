"""How a part prints a figure."""

import json


def figure(name: str, value: float | str, unit: str = "") -> None:
    """Print one figure as a JSON line; `python -m tests.gpu` adds the name of the card."""
    print(json.dumps({"figure": name, "value": value, "unit": unit}), flush=True)

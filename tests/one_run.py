"""The records of a made-up run, as a report reads them: the live weights and three averages, one of each verdict."""

import json
from pathlib import Path

STEPS = (100, 200, 300)
LIVE = (3.0, 2.0, 2.1)
AVERAGES = {  # values, and the standard error of each gap
    "0.9": ((2.9, 1.95, 2.0), 0.02),  # ends 0.1 below live: better
    "0.99": ((3.5, 1.90, 2.095), 0.02),  # ends 0.005 below live: within 2 SE; its step 200 is the best of all
    "0.9999": ((5.0, 4.9, 4.8), 0.02),  # worse
}


def make_run(run_dir: Path, *, meta: dict[str, object] | None = None, sign: float = 1.0) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for place, step in enumerate(STEPS):
            record = {"train/step": step, "train/loss": 2.0, "eval/live/loss": sign * LIVE[place]}
            for name, (values, error) in AVERAGES.items():
                record |= {
                    f"eval/ema/{name}/loss": sign * values[place],
                    f"eval/gap/{name}/loss": sign * (LIVE[place] - values[place]),
                    f"eval/gap/{name}/loss_se": error,
                    f"ema/{name}/decay": float(name),
                    f"ema/{name}/rel_l2": 0.01 * step * (1 - float(name)),
                }
            file.write(json.dumps(record) + "\n")
    (run_dir / "config.yaml").write_text("note: <script>alert(1)</script>\n")
    (run_dir / "overrides.yaml").write_text("- experiment=quickstart\n")
    (run_dir / "meta.json").write_text(json.dumps({"host": "<img src=x>"} | (meta or {})))
    return run_dir

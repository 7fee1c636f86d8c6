"""Runs `cgs_jax.benchmark` on ACDC-like random scans in a process of its own."""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[1]


def step(seconds: float, size: int, batch: int, **fields: Any) -> dict[str, Any]:
    """The 'step' of its JSON; `fields` of the config are written with __ for the dot."""
    return _stage("step", seconds, size, batch, fields)


def slice_ms(size: int, batch: int, **fields: Any) -> float:
    """Prediction of one slice among the volumes of its 'evaluation'."""
    fields |= {"eval_batch": batch, "upsample": "nearest", "largest_component": False}
    result = _stage("evaluation", 1, size, batch, fields)
    return result["volumes"] * result["prediction_ms"] / result["slices"]


def _stage(stage, seconds, size, batch, fields):
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    fields |= {"data.size": size, "data.root": "none"}
    fields |= {f"batch.{half}": batch // 2 for half in ("labelled", "unlabelled")}
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "cgs_jax.benchmark", "--config", "configs/acdc.py"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        command += [f"--stages={stage}", f"--seconds={seconds}", f"--output={output}"]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())[stage]

"""How the step grows with image size, batch and number of organs.

python benchmarks/growth.py --sizes 128,256,512 --batches 4,8,16 --organs 3,4,8,13

Prints Markdown tables. Each row is a process of its own.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).parents[1]


def step(seconds: float, size: int, batch: int, organs: int) -> dict:
    """What `cgs_jax.benchmark` says of one setting."""
    fields = {"data.size": size, "data.root": "none"}
    fields |= {"batch.labelled": batch // 2, "batch.unlabelled": batch // 2}
    fields["data.classes"] = repr(tuple(f"organ{i}" for i in range(organs)))
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "result.json"
        command = [sys.executable, "-m", "cgs_jax.benchmark", "--config", "configs/acdc.py"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        command += ["--stages=step", f"--seconds={seconds}", f"--output={output}"]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def main():
    """Prints one table for each of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="128,256,512")
    parser.add_argument("--batches", default="4,8,16")
    parser.add_argument("--organs", default="3,4,8,13")
    parser.add_argument("--size", type=int, default=128, help="while the others change")
    parser.add_argument("--batch", type=int, default=4, help="while the others change")
    parser.add_argument("--seconds", type=float, default=10)
    o = parser.parse_args()
    numbers = {
        k: [int(v) for v in getattr(o, k).split(",")] for k in ("sizes", "batches", "organs")
    }
    for name, rows in (
        ("size", [(s, (s, o.batch, 3)) for s in numbers["sizes"]]),
        ("batch", [(b, (o.size, b, 3)) for b in numbers["batches"]]),
        ("organs", [(k, (o.size, o.batch, k)) for k in numbers["organs"]]),
    ):
        print(f"\n| {name} | step ms | us a pixel | temporary GB |\n|---|---|---|---|", flush=True)
        for value, setting in rows:
            result = step(o.seconds, *setting)["step"]
            pixels = setting[0] ** 2 * setting[1]
            print(
                f"| {value} | {result['ms']:.1f} | {1000 * result['ms'] / pixels:.3f} "
                f"| {result['temporary_bytes'] / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

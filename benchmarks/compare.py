"""Times this program against PyTorch on one machine, in turn: A B A B.

pip install -r benchmarks/requirements.txt
python benchmarks/compare.py --rounds 2 --size 256 --batch 24

Prints a Markdown row a pair: the median step of either and their ratio. `authors` is the iteration
of the authors' code as it is run: their plan, float32, NCHW, not compiled. `lean` and `full` are
tuned: channels last and, on a GPU, bfloat16 and torch.compile (on 2 CPU cores compiled steps are
slower: 540 against 415 ms at 12 slices of 128 x 128). `predict:predict` times the labels of a batch
of slices on the training grid, PyTorch's with batch norm folded into its convolutions.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import ours

COUNTERPART = pathlib.Path(__file__).with_name("torch_cgs.py")


def torch(options: argparse.Namespace, plan: str) -> float:
    """Median ms of a step of `torch_cgs.py`."""
    command = [options.torch_python, COUNTERPART]
    command += ["--size", options.size, "--batch", options.batch, "--steps", options.steps]
    if plan == "authors":
        command += ["--plan", "full", "--layout", "contiguous_format"]
    else:
        command += ["--plan", plan, "--layout", "channels_last"]
        command += ["--dtype", "bfloat16", "--compile"] * options.gpu
    run = subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE, text=True)
    return statistics.median(json.loads(run.stdout.splitlines()[-1])["step_ms"])


def main():
    """Runs the pairs and prints the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of PyTorch")
    parser.add_argument("--seconds", type=float, default=25, help="of timed steps of ours")
    parser.add_argument("--pairs", default="lean:lean,lean:authors,full:full", help="OURS:TORCH")
    parser.add_argument("--gpu", action="store_true", help="tuned for a GPU: bfloat16, compiled")
    parser.add_argument("--torch-python", default=sys.executable, help="Python that has torch")
    options = parser.parse_args()
    known = {"predict:predict"}
    known |= {f"{a}:{b}" for a in ("lean", "full") for b in ("lean", "full", "authors")}
    for pair in options.pairs.split(","):
        if pair not in known:
            parser.error(f"--pairs: {pair}; there are: {', '.join(sorted(known))}")
    if subprocess.run([options.torch_python, "-c", "import torch"], check=False).returncode:
        parser.error(f"{options.torch_python} has no torch: see benchmarks/requirements.txt")
    print("| ours | PyTorch | ours ms | PyTorch ms | PyTorch / ours |\n|---|---|---|---|---|")
    dtype = "bfloat16" if options.gpu else "float32"
    for _ in range(options.rounds):
        for pair in options.pairs.split(","):
            mine, other = pair.split(":")
            size, batch, fields = options.size, options.batch, {"model__dtype": dtype}
            if mine == "predict":
                a = batch * ours.slice_ms(size, batch, **fields)
            else:
                a = ours.step(options.seconds, size, batch, method__plan=mine, **fields)["ms"]
            b = torch(options, other)
            print(f"| {mine} | {other} | {a:.1f} | {b:.1f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""How the step grows with image size, batch and number of organs.

python benchmarks/growth.py --sizes 128,256,512 --batches 4,8,16 --organs 3,4,8,13

Prints Markdown tables. Each row is a process of its own.
"""

import argparse

import ours


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
            size, batch, organs = setting
            classes = repr(tuple(f"organ{i}" for i in range(organs)))
            result = ours.step(o.seconds, size, batch, data__classes=classes)
            pixels = size**2 * batch
            print(
                f"| {value} | {result['ms']:.1f} | {1000 * result['ms'] / pixels:.3f} "
                f"| {result['temporary_bytes'] / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

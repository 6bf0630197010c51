"""How many examples a task needs, with a teacher that writes variations of them and without.

    python benchmarks/by_examples.py --output benchmarks/results/by_examples_cpu

The sums of `recipes/few_samples.py`, with 30, 100, 300 and 1,000 examples and three seeds: the same student fine-tuned
on them alone, taught the teacher's variations, and then on its own text. All take the same steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from measure import write_results

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from few_samples import Sizes, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[30, 100, 300, 1000], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--student_steps", type=int, default=600, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    args = parser.parse_args()
    began, sizes = time.perf_counter(), Sizes(held_out=1000, asked=3000, student_steps=args.student_steps)
    right, table = compare(args.examples, args.seeds, sizes)
    print(table)
    if args.output is not None:
        intro = f"Unseen sums that are right: the mean of {args.seeds} seeds (least to most)."
        write_results(args.output, "A few examples", right, intro, table, began=began)


if __name__ == "__main__":
    main()

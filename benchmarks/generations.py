"""Does a student of a student know more, and what is forgotten from domain to domain? Over several seeds.

    python benchmarks/generations.py --output benchmarks/results/generations_cpu

Both parts are recipes on the embedded corpus: `born_again.py`, where each generation learns from the one before or from
the mixture of all before it, and `continual.py`, with each of its methods. They share the demo's teacher, which is
trained in runs/demo on the first call, and the demo's student. A seed decides the order of the data and what is
learned from again; all seeds begin from the same weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import write_results

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import born_again
import continual
from demo import as_options, use_all_cores

from llm_distill.evaluation.stages import stage_figures
from llm_distill.tables import Table


def measure_generations(folder: Path, seed: int, most: int, steps: int, ensemble: bool) -> dict[str, Any]:
    """The held-out loss of each generation, and the seconds of all."""
    began = time.perf_counter()
    changed = {"output_dir": folder, "seed": 1000 * seed, "max_steps": steps}
    generations = born_again.raise_generations([*born_again.embedded(), *as_options(changed)], most, ensemble)
    losses = [generation.losses.mean()["value"] for generation in generations]
    return {"losses": losses, "seconds": time.perf_counter() - began}


def measure_continual(folder: Path, seed: int, steps: int, texts: int) -> dict[str, dict[str, float]]:
    """Of each method the mean loss over the domains at the end, backward transfer, and the loss on the last domain."""
    datasets = {name: dataset.take(texts) for name, dataset in continual.packages().items()}
    changed = {"seed": seed, "max_steps": steps, "warmup_steps": max(1, steps // 10)}
    options, domains = [*continual.embedded(), *as_options(changed)], continual.split_domains(datasets)
    results = {}
    for method in continual.METHODS:
        began = time.perf_counter()
        figures = stage_figures(continual.learn_all(options, folder, domains, method))
        results[method] = {
            "average": figures["average"][-1]["value"],
            "backward_transfer": figures["backward_transfer"]["value"],
            "last": list(figures["losses"].values())[-1][-1]["value"],
            "seconds": time.perf_counter() - began,
        }
    return results


def mean_and_spread(values: Sequence[float], form: str = ".3f") -> str:
    """`1.234 ± 0.005`, the standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def tables_of(generations: dict[str, list[dict[str, Any]]], continual: list[dict[str, Any]]) -> str:
    rows = []
    for kind, runs in generations.items():
        for number in range(max(len(run["losses"]) for run in runs)):
            losses = [run["losses"][number] for run in runs if number < len(run["losses"])]
            pairs = [run["losses"][number] - run["losses"][0] for run in runs if number < len(run["losses"])]
            change = mean_and_spread(pairs, "+.3f") if number else ""
            rows.append([kind, number, len(losses), mean_and_spread(losses), change])
    header = ["learns from", "generation", "seeds that came so far", "held-out loss", "beside text alone"]
    parts = ["## Born-again", Table(header, rows).markdown()]
    rows = [
        [
            method,
            *(mean_and_spread([run[method][name] for run in continual]) for name in ("average", "last")),
            mean_and_spread([run[method]["backward_transfer"] for run in continual], "+.3f"),
            f"{statistics.fmean(run[method]['seconds'] for run in continual):.0f}",
        ]
        for method in continual[0]
    ]
    header = ["", "mean loss over the domains", "loss on the last", "backward transfer", "seconds"]
    return "\n\n".join([*parts, "## Four domains, one after the other", Table(header, rows).markdown()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--generations", type=int, default=3, help="at most; default: %(default)s")
    parser.add_argument("--generation_steps", type=int, default=150, help="of each; default: %(default)s")
    parser.add_argument("--stage_steps", type=int, default=80, help="of each; default: %(default)s")
    parser.add_argument("--texts", type=int, default=continual.PASSAGES, help="of a domain; default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    arguments = parser.parse_args()
    use_all_cores()
    began = time.perf_counter()
    kinds = {"the one before": False, "all before": True}
    generations: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    stages = []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(1, arguments.seeds + 1):
            for kind, ensemble in kinds.items():
                folder = Path(name, f"{seed}-{'all' if ensemble else 'one'}")
                sizes = (arguments.generations, arguments.generation_steps)
                generations[kind].append(measure_generations(folder, seed, *sizes, ensemble))
            stages.append(measure_continual(Path(name, str(seed)), seed, arguments.stage_steps, arguments.texts))
    table = tables_of(generations, stages)
    print(table)
    if arguments.output:
        found = {"generations": generations, "continual": stages}
        write_results(arguments.output, "Generations and domains", found, table, began=began)


if __name__ == "__main__":
    main()

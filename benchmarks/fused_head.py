"""The fused head loss against the matrix products alone, and against naive, TRL's and Liger's.

    python benchmarks/fused_head.py --output benchmarks/results/fused_head_cpu
    python benchmarks/fused_head.py --device cuda --dtype bfloat16 --rows 8192 --vocab 128256 151936 262144

Every case runs in a process of its own, in turn with its floor (the products that it cannot do without, in chunks, into
buffers that are used again), and is given as the ratio to it: machines are noisy, ratios within a run less so. "Extra
memory" is the peak of the first call over what was there before, less the gradients that must be there afterwards. The
gradient's error is the relative distance to float64, over fewer rows. Peers are measured where they are installed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import MIB, in_fresh_process, machine, peak_memory, seconds
from torch import Tensor, nn

from llm_distill.divergences import DIVERGENCES, make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import HiddenSignal, Signal, SparseSignal

K = 64
"""Tokens of a sparse signal."""

OURS = {
    **{name: {"divergence": name} for name in DIVERGENCES},
    "forward_kl, T = 2": {"divergence": "forward_kl", "temperature": 2.0},
    "forward_kl + CE": {"divergence": "forward_kl", "ce_weight": 0.5},
    "top-64 with tail": {"signal": "top-k"},
    "top-64 with tail + CE": {"signal": "top-k", "ce_weight": 0.5},
    "64 samples": {"signal": "samples"},
    "forward_kl, head frozen": {"divergence": "forward_kl", "frozen": True},
    "top-64, head frozen": {"signal": "top-k", "frozen": True},
    "forward_kl, no_grad": {"divergence": "forward_kl", "no_grad": True},
}
PEERS = {
    "naive": {"peer": "naive"},
    "naive, jsd": {"peer": "naive", "divergence": "jsd"},
    "TRL": {"peer": "trl"},
    "TRL, reverse_kl": {"peer": "trl", "divergence": "reverse_kl"},
    "TRL, jsd": {"peer": "trl", "divergence": "jsd"},
    "Liger": {"peer": "liger"},
    "Liger, jsd": {"peer": "liger", "divergence": "jsd"},
    "Liger, compiled": {"peer": "liger", "compiled": True},
    "Liger, compiled, jsd": {"peer": "liger", "compiled": True, "divergence": "jsd"},
}
SHORT = ("forward_kl", "jsd", "forward_kl + CE", "top-64 with tail", "naive", "TRL", "Liger")
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class Problem:
    """Inputs of one size: random hidden states and heads whose logits have a standard deviation of about 2."""

    def __init__(self, task: dict[str, Any], rows: int) -> None:
        self.device, self.dtype = task["device"], getattr(torch, task["dtype"])
        self.rows, self.vocab, self.widths = rows, task["vocab"], (task["student"], task["teacher"])
        torch.manual_seed(0)
        self.student_hidden, self.student_head = self._side(task["student"])
        self.teacher_hidden, self.teacher_head = self._side(task["teacher"])
        self.student_hidden.requires_grad_()
        self.student_head.weight.requires_grad_(not task.get("frozen"))
        self.targets = torch.randint(0, self.vocab, (rows,), device=self.device)

    def _side(self, width: int) -> tuple[Tensor, nn.Linear]:
        head = nn.Linear(width, self.vocab, bias=False, device=self.device, dtype=self.dtype)
        nn.init.normal_(head.weight, std=2 / math.sqrt(width))
        return torch.randn(self.rows, width, device=self.device, dtype=self.dtype), head.requires_grad_(False)

    def sparse(self, kind: str) -> Signal:
        ids = torch.randint(0, self.vocab, (self.rows, K), device=self.device)
        if kind == "samples":
            return SparseSignal(ids, torch.full((self.rows, K), -math.log(K), device=self.device), None, self.vocab)
        ids = (ids[:, :1] + torch.arange(K, device=self.device)) % self.vocab  # distinct
        cells = torch.randn(self.rows, K + 1, device=self.device).log_softmax(-1)
        return SparseSignal(ids, cells[:, :-1].contiguous(), cells[:, -1].contiguous(), self.vocab)


def ours(problem: Problem, task: dict[str, Any]) -> Callable[[], Tensor]:
    head = LMHead(problem.student_head, problem.vocab)
    signal: Signal
    if "signal" in task:
        signal = problem.sparse(task["signal"])
    else:
        signal = HiddenSignal(problem.teacher_hidden, LMHead(problem.teacher_head, problem.vocab))
    divergence = make_divergence(task.get("divergence", "forward_kl"))
    options = {"temperature": task.get("temperature", 1.0), "ce_weight": task.get("ce_weight", 0.0)}
    options["targets"] = problem.targets if options["ce_weight"] else None
    return lambda: fused_head_loss(problem.student_hidden, head, signal, divergence, **options)[0]


def peer(problem: Problem, task: dict[str, Any]) -> Callable[[], Tensor]:
    name, divergence = task["peer"], task.get("divergence", "forward_kl")
    hidden, weight = problem.student_hidden, problem.student_head.weight
    teacher, teacher_weight = problem.teacher_hidden, problem.teacher_head.weight
    beta = BETA[divergence]
    if name == "naive":
        return lambda: naive(hidden @ weight.T, teacher @ teacher_weight.T, divergence)
    if name == "trl":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        arguments = (hidden, weight, None, teacher, teacher_weight, None, beta)
        return lambda: ChunkedDivergenceFunction.apply(*arguments)[0].sum() / problem.rows
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=beta, compiled=task.get("compiled", False))
    return lambda: loss(hidden, weight, teacher, teacher_weight, problem.targets)


def naive(student_logits: Tensor, teacher_logits: Tensor, divergence: str) -> Tensor:
    """What one writes first: full logits, and autograd."""
    log_q, log_p = (
        z.float().log_softmax(-1) if z.dtype != torch.float64 else z.log_softmax(-1)
        for z in (student_logits, teacher_logits)
    )
    kl = nn.functional.kl_div
    if divergence == "forward_kl":
        return kl(log_q, log_p, log_target=True, reduction="batchmean")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum(0.5 * kl(log_m, x, log_target=True, reduction="batchmean") for x in (log_p, log_q))


class Floor:
    """The products that a case cannot do without, each chunk into the same buffers."""

    def __init__(self, problem: Problem, task: dict[str, Any], chunk: int) -> None:
        self.problem, self.chunk = problem, min(chunk, problem.rows)
        self.teacher = "signal" not in task
        self.gradients = not task.get("no_grad")
        self.d_weight = (
            None if task.get("frozen") or not self.gradients else torch.zeros_like(problem.student_head.weight)
        )
        new = problem.student_hidden.new_empty
        self.logits, self.d_hidden = new(self.chunk, problem.vocab), new(self.chunk, problem.widths[0])
        self.teacher_logits = new(self.chunk, problem.vocab)

    @torch.no_grad()
    def __call__(self) -> None:
        p = self.problem
        weight, teacher_weight = p.student_head.weight, p.teacher_head.weight
        for start in range(0, p.rows, self.chunk):
            x = p.student_hidden[start : start + self.chunk]
            n = len(x)
            torch.mm(x, weight.T, out=self.logits[:n])
            if self.teacher:
                y = p.teacher_hidden[start : start + self.chunk]
                torch.mm(y, teacher_weight.T, out=self.teacher_logits[:n])
            if self.gradients:
                torch.mm(self.logits[:n], weight, out=self.d_hidden[:n])
            if self.d_weight is not None:
                torch.addmm(self.d_weight, self.logits[:n].T, x, beta=0, out=self.d_weight)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process: time in turn with its floor, memory of the first call."""
    device = task["device"]
    problem = Problem(task, task["rows"])
    loss = (peer if "peer" in task else ours)(problem, task)
    leaves = [leaf for leaf in (problem.student_hidden, problem.student_head.weight) if leaf.requires_grad]

    def run() -> None:
        if task.get("no_grad"):
            with torch.no_grad():
                loss()
            return
        gradients = torch.autograd.grad(loss(), leaves)
        del gradients

    warm_up(problem)
    with peak_memory(device) as memory:
        first = seconds(run, device)
    mandatory = 0 if task.get("no_grad") else sum(leaf.numel() * leaf.element_size() for leaf in leaves) / MIB
    floors = [Floor(problem, task, chunk) for chunk in task["floor_chunks"]]
    floor = min(floors, key=lambda floor: seconds(floor, device))
    times = [(seconds(floor, device), seconds(run, device)) for _ in range(task["repeats"])]
    return {
        "seconds": [case for _, case in times],
        "floor_seconds": [base for base, _ in times],
        "first_call_seconds": first,
        "extra_mib": memory["mib"] - mandatory,
        "mandatory_mib": mandatory,
    }


def warm_up(problem: Problem) -> None:
    """Libraries allocate their own workspaces at the first product."""
    a = torch.randn(64, problem.widths[0], device=problem.device, dtype=problem.dtype)
    _ = (a @ problem.student_head.weight[:4096].T).detach() @ problem.student_head.weight[:4096].detach()


def gradient_error(task: dict[str, Any]) -> dict[str, Any]:
    """The relative distance of both gradients from those in float64 of the same inputs."""
    problem = Problem(task, task["check_rows"])
    loss = (peer if "peer" in task else ours)(problem, task)
    leaves = [problem.student_hidden, problem.student_head.weight]
    gradients = torch.autograd.grad(loss(), leaves)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in leaves)
    teacher_logits = problem.teacher_hidden.double() @ problem.teacher_head.weight.double().T
    exact = torch.autograd.grad(
        naive(hidden @ weight.T, teacher_logits, task.get("divergence", "forward_kl")), [hidden, weight]
    )
    return {
        "gradient_error": max(float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True))
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Markdown, the fastest of ours first as they stand."""
    lines = [
        "| | time, s | × floor | extra memory, MiB | first call, s | gradient error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, case in cases.items():
        if "error" in case:
            lines.append(f"| {name} | {case['error']} | | | | |")
            continue
        error = f"{case['gradient_error']:.0e}" if "gradient_error" in case else ""
        lines.append(
            f"| {name} | {case['median_seconds']:.3f} | {case['ratio_to_floor']:.2f} | {case['extra_mib']:,.0f} | "
            f"{case['first_call_seconds']:.2f} | {error} |"
        )
    return "\n".join(lines)


def plot(settings: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(settings), figsize=(8 * len(settings), 6), squeeze=False, layout="constrained")
    for axis, (title, setting) in zip(axes[0], settings.items(), strict=True):
        cases = {name: case for name, case in setting["cases"].items() if "error" not in case}
        names = list(cases)[::-1]
        colours = ["tab:grey" if name in PEERS else "tab:blue" for name in names]
        axis.barh(names, [cases[name]["ratio_to_floor"] for name in names], color=colours)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=title, xlabel="time ÷ time of the matrix products alone")
        for row, name in enumerate(names):
            case = cases[name]
            axis.text(
                case["ratio_to_floor"], row, f" {case['ratio_to_floor']:.2f}, {case['extra_mib']:,.0f} MiB", va="center"
            )
        axis.margins(x=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048])
    parser.add_argument("--vocab", type=int, nargs="+", default=[50_000])
    parser.add_argument("--student", type=int, default=512, help="width of the student's hidden states")
    parser.add_argument("--teacher", type=int, default=1024, help="width of the teacher's")
    parser.add_argument("--cases", nargs="+", default=None, help=f"of {', '.join([*OURS, *PEERS])}")
    parser.add_argument("--rounds", type=int, default=2, help="how often every case gets a fresh process")
    parser.add_argument("--repeats", type=int, default=3, help="measurements a process, in turn with the floor")
    parser.add_argument(
        "--short", action="store_true", help="a few cases, a smaller problem, one round: about two minutes"
    )
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json, NAME.md and NAME.png")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task)
        print(json.dumps(gradient_error(task) if task.pop("check", False) else measure(task)))
        return

    if args.short:
        args.rows, args.vocab, args.rounds, args.repeats = [1024], [32_000], 1, 3
    known = OURS | PEERS
    names = args.cases or (SHORT if args.short else list(known))
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown cases {unknown}; known: {', '.join(known)}")
    settings: dict[str, dict[str, Any]] = {}
    for dtype in args.dtype:
        for rows in args.rows:
            for vocab in args.vocab:
                common = {
                    "device": args.device,
                    "dtype": dtype,
                    "rows": rows,
                    "vocab": vocab,
                    "student": args.student,
                    "teacher": args.teacher,
                    "repeats": args.repeats,
                    "floor_chunks": [512, 1024] if args.device == "cpu" else [1024, 2048, 4096],
                    "check_rows": 128 if args.device == "cpu" else 512,
                }
                title = f"{dtype}, N = {rows:,}, V = {vocab:,}, widths {args.student} and {args.teacher}"
                settings[title] = {"setting": common, "cases": run_cases(names, known, common, args.rounds)}
                print(f"\n{title}\n\n{table(settings[title]['cases'])}\n", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        about = machine(args.device)
        args.output.with_suffix(".json").write_text(
            json.dumps({"machine": about, "settings": settings}, indent=1) + "\n"
        )
        where = f"{about['date']}, {about['device']}, {about['threads']} threads. `{about['command']}`"
        body = "\n\n".join(f"{title}:\n\n{table(setting['cases'])}" for title, setting in settings.items())
        args.output.with_suffix(".md").write_text(f"# The fused head loss\n\n{where}\n\n{body}\n")
        plot(settings, args.output.with_suffix(".png"))


def run_cases(
    names: list[str], known: dict[str, dict[str, Any]], common: dict[str, Any], rounds: int
) -> dict[str, dict[str, Any]]:
    """Each case `rounds` times in a fresh process, the rounds in turn, and the medians of all measurements."""
    cases: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name in names:
            task = {**common, **known[name]}
            print(f"  round {number + 1}/{rounds}: {name}", end="\r", flush=True)
            result = in_fresh_process(__file__, task)
            if "error" in result:
                cases[name] = result
                continue
            if name not in cases:
                cases[name] = result
                if not set(task) & {"signal", "frozen", "no_grad", "temperature", "ce_weight"} and task.get(
                    "divergence", "forward_kl"
                ) in ("forward_kl", "jsd"):
                    cases[name] |= in_fresh_process(__file__, {**task, "check": True})
            elif "error" not in cases[name]:
                for key in ("seconds", "floor_seconds"):
                    cases[name][key] += result[key]
                for key in ("extra_mib", "first_call_seconds"):
                    cases[name][key] = min(cases[name][key], result[key])
    for case in cases.values():
        if "error" not in case:
            case["median_seconds"] = statistics.median(case["seconds"])
            ratios = [a / b for a, b in zip(case["seconds"], case["floor_seconds"], strict=True)]
            case["ratio_to_floor"] = statistics.median(ratios)
    return cases


if __name__ == "__main__":
    main()

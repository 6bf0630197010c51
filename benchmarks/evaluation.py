"""What the gap report's scores cost, against the two forwards that they cannot do without.

    python benchmarks/evaluation.py --output benchmarks/results/evaluation_cpu

Teacher and student (random weights) go over the same texts, in turn: once with the models' own forwards, which build
full logits and do nothing with them, and once with `measure_domain`, which makes every figure of a domain: losses,
KL both ways, agreement, calibration, by position and frequency, with its bootstraps and passages. A batch is made anew
each time in both. The ratio is that of a round; peak memory is over what the models take.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from datasets import Dataset
from measure import machine, peak_memory, seconds
from train_step import SIZES, build, tokenizer_of, tokens
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import LiveTeacher
from llm_distill.evaluation.compare import HeldOutTexts
from llm_distill.evaluation.domains import measure_domain
from llm_distill.tables import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=SIZES, help="of the models; default: %(default)s")
    parser.add_argument("--texts", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    args = parser.parse_args()

    task, size = {"size": args.size, "device": args.device}, SIZES[args.size]
    student, teacher = (build(task, who).eval() for who in ("student", "teacher"))
    tokenizer, collate = tokenizer_of(size["vocab"]), DataCollatorForLanguageModeling(pad_token_id=0)
    ids = tokens(task, args.texts).tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
    live = LiveTeacher(teacher, tokenizer)
    live.fit_to(tokenizer)

    @torch.no_grad()
    def forwards() -> None:
        for start in range(0, args.texts, size["batch"]):
            batch = collate([dataset[i] for i in range(start, start + size["batch"])])
            inputs = {name: batch[name].to(args.device) for name in ("input_ids", "attention_mask")}
            for model in (student, teacher):
                _ = model(**inputs, use_cache=False).logits

    def report() -> None:
        measure_domain({"student": student}, live, HeldOutTexts(dataset, collate, tokenizer, size["batch"]))

    report()  # compiles
    forwards()
    times: dict[str, list[float]] = {"forwards": [], "report": []}
    memory: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, function in (("forwards", forwards), ("report", report)):
            with peak_memory(args.device) as peak:
                times[name].append(seconds(function, args.device))
            memory[name] = max(peak["mib"], memory.get(name, 0))
    ratios = [report / forwards for forwards, report in zip(times["forwards"], times["report"], strict=True)]
    rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    labels = {"two forwards with logits": "forwards", "every figure of a domain": "report"}
    rows = [(label, f"{statistics.median(times[n]):.2f}", f"{memory[n]:,.0f}") for label, n in labels.items()]
    table = Table(("", "seconds", "peak memory, MiB"), rows).markdown() + (
        f"\n\n{statistics.median(ratios):.2f} × (by round: {rounds}). {args.texts} texts of {size['length']:,} tokens, "
        f"V = {size['vocab']:,}."
    )
    print(table)
    if args.output:
        about = machine(args.device)
        content = {"machine": about, "seconds": times, "ratios": ratios, "peak_mib": memory, "texts": args.texts}
        args.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        where = f"{about['date']}, {about['device']}, {about['cores']} cores. `{about['command']}`"
        args.output.with_suffix(".md").write_text(f"# The gap report's scores\n\n{where}\n\n{table}\n")


if __name__ == "__main__":
    main()

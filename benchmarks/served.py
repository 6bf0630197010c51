"""A training step with a teacher behind a server, against the same step with its signal in memory.

    python benchmarks/served.py --output benchmarks/results/served_cpu

The server answers faster than the student trains: it runs in a process of its own and sends an answer in vLLM's form
that was made before, so that what is measured is what the toolkit adds: requests, JSON, tensors, and their way from the
loader's two workers into the loss. The goal is a ratio of at most 1.05. Server, workers and student share the machine's
cores; with a real server elsewhere, and more cores than two, less of this is seen. CPU seconds (of the student's
process, and of the workers) tell about the same where others are at work on the machine, which its load average says.

Each case runs in a fresh process, in turn, for a few rounds; a ratio is taken within a round. A step lasts from the end
of the one before to its own end; the first two are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from measure import in_fresh_process, machine

# Before transformers reads them, here and in the children.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from train_step import LEFT_OUT, SIZES, PrecomputedTeacher, StepTimes, build, tokenizer_of, tokens
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import DistillationConfig, DistillationTrainer
from llm_distill.teachers import ServedTeacher, Teacher

SIZE = "small"
CASES = {"in memory": "memory", "served": "served"}


def answer_of(k: int, length: int, vocab: int) -> bytes:
    """What vLLM says about a text: random tokens in random places, and each token of the text beside them."""
    generator = torch.Generator().manual_seed(0)
    tokens_told: list[dict[str, Any] | None] = [None]
    for _ in range(length - 1):
        ids = torch.randperm(vocab, generator=generator)[: k + 1].tolist()
        log_p = torch.randn(k + 1, generator=generator).log_softmax(-1).sort(descending=True).values.tolist()
        ranks = [*range(1, k + 1), vocab // 2]
        cells = sorted(zip(ids, log_p, ranks, strict=True), key=lambda cell: cell[2] <= k)  # that of the text first
        tokens_told.append({str(i): {"logprob": p, "rank": n, "decoded_token": f"word{i}"} for i, p, n in cells})
    choice = {"index": 0, "text": "word1", "finish_reason": "length", "prompt_logprobs": tokens_told}
    return json.dumps({"object": "text_completion", "model": "teacher", "choices": [choice]}).encode()


def serve(port: int, k: int, length: int, vocab: int) -> None:
    """Answers every text with the same bytes; in a process of its own."""
    tokenizer, short, long = tokenizer_of(vocab), answer_of(k, 2, vocab), answer_of(k, length, vocab)
    card = json.dumps({"data": [{"id": "teacher", "max_model_len": length + 1}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def do_GET(self) -> None:
            self._send(card)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/detokenize":
                self._send(json.dumps({"prompt": tokenizer.decode(json.loads(body)["tokens"])}).encode())
            else:
                self._send(short if len(body) < 200 else long)

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process."""
    size, steps = SIZES[SIZE], task["steps"] + LEFT_OUT
    vocab, length = size["vocab"], size["length"]
    served = task["teacher"] == "served"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = multiprocessing.get_context("spawn").Process(
        target=serve, args=(port, task["k"], length, vocab), daemon=True
    )
    if served:
        answers.start()
        _wait_for(port)
        teacher: Teacher = ServedTeacher(f"http://127.0.0.1:{port}", k=task["k"])
    else:
        teacher = PrecomputedTeacher(size["batch"] * (length - 1), vocab, "cpu", task["k"])
    rows = tokens({"size": SIZE}, steps * size["batch"]).tolist()
    tokenizer, clock = tokenizer_of(vocab), StepTimes("cpu")
    with tempfile.TemporaryDirectory(prefix="served_") as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=size["batch"],
            learning_rate=1e-4,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            dataloader_num_workers=2 if served else 0,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=steps,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=length,
        )
        trainer = DistillationTrainer(
            model=build({"size": SIZE, "device": "cpu"}, "student"),
            teacher=teacher,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
        trainer.add_callback(clock)
        before = resource.getrusage(resource.RUSAGE_SELF)
        trainer.train()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended: the workers
    if served:
        answers.terminate()
    share = next(entry["data_share"] for entry in trainer.state.log_history if "data_share" in entry)
    own = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": clock.seconds[LEFT_OUT:],
        "data_share": share,
        "worker_cpu_seconds": (used.ru_utime + used.ru_stime) / steps,
        "cpu_seconds": (own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime) / steps,
        "load": os.getloadavg()[0],
    }


def _wait_for(port: int) -> None:
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return


def run_all(ks: list[int], steps: int, rounds: int) -> dict[int, dict[str, Any]]:
    """For each k, both cases in turn; the medians over all rounds, and the ratio of each round."""
    cases: dict[int, dict[str, Any]] = {}
    for k in ks:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
        for number in range(rounds):
            for name, teacher in CASES.items():
                print(f"  k = {k}, round {number + 1}/{rounds}: {name:<10}", end="\r", flush=True)
                task = {"teacher": teacher, "k": k, "steps": steps}
                results[name].append(in_fresh_process(__file__, task))
                if "error" in results[name][-1]:
                    raise RuntimeError(f"{name}, k = {k}: {results[name][-1]['error']}")
        cases[k] = summary(k, results)
    return cases


def summary(k: int, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of each round."""
    workers = {name: statistics.median(run["worker_cpu_seconds"] for run in results[name]) for name in CASES}
    medians = {name: [statistics.median(run["seconds"]) for run in results[name]] for name in CASES}
    ratios = [ours / floor for ours, floor in zip(medians["served"], medians["in memory"], strict=True)]
    return {
        **{f"{name} seconds": statistics.median(values) for name, values in medians.items()},
        **{f"{name} cpu": statistics.median(run["cpu_seconds"] for run in results[name]) for name in CASES},
        "load": statistics.median(run["load"] for name in CASES for run in results[name]),
        "ratio": statistics.median(ratios),
        "ratios_by_round": ratios,
        "data_share": statistics.median(run["data_share"] for run in results["served"]),
        "worker_cpu_seconds": workers["served"] - workers["in memory"],  # without the compiler, which both call
        "answer_kib": len(answer_of(k, SIZES[SIZE]["length"], SIZES[SIZE]["vocab"])) / 1024,
        "rounds": results,
    }


def table(cases: dict[int, dict[str, Any]]) -> str:
    """Markdown, a line per k."""
    lines = [
        "| k | in memory, s a step | served, s a step | × in memory (by round) | waiting for batches "
        "| CPU s a step: in memory | served | its workers | KiB an answer | load average |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for k, case in cases.items():
        rounds = ", ".join(f"{ratio:.3f}" for ratio in case["ratios_by_round"])
        lines.append(
            f"| {k} | {case['in memory seconds']:.3f} | {case['served seconds']:.3f} | {case['ratio']:.3f} ({rounds}) "
            f"| {case['data_share']:.1%} | {case['in memory cpu']:.3f} | {case['served cpu']:.3f} "
            f"| {case['worker_cpu_seconds']:.3f} | {case['answer_kib']:,.0f} | {case['load']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 64])
    parser.add_argument("--steps", type=int, default=12, help=f"steps measured a process, after {LEFT_OUT} others")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case gets a fresh process")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(json.loads(args.task))))
        return

    cases, size = run_all(args.k, args.steps, args.rounds), SIZES[SIZE]
    title = f"a batch of {size['batch']} × {size['length']:,} tokens, V = {size['vocab']:,}, two loader workers"
    print(f"\n{title}\n\n{table(cases)}\n", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        about = machine("cpu")
        whole = {"machine": about, "setting": {"steps": args.steps, "rounds": args.rounds}, "cases": cases}
        args.output.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        where = f"{about['date']}, {about['device']}, {about['cores']} cores. `{about['command']}`"
        args.output.with_suffix(".md").write_text(
            f"# A step with a served teacher\n\n{where}\n\n{title[0].upper()}{title[1:]}. The server, the workers and "
            f"the student share the cores.\n\n{table(cases)}\n"
        )


if __name__ == "__main__":
    main()

"""How fast the teacher writes: our engine against the same `generate` calls by hand, and against one prompt at a time.

    python benchmarks/generation.py --output benchmarks/results/generation_cpu

By hand: prompts in the best order (by length), padded to the left in batches, `model.generate` on each, and nothing
else. Ours: `llm_distill.generation.generate` over the same prompts into a folder, with its journal, its filters and its
Parquet files. One by one: `model.generate` on each prompt. Greedy, with a fixed number of new tokens, so that all three
write the same; ratios are medians of runs in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from measure import machine
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from llm_distill.data.corpus import load_corpus, train_tokenizer
from llm_distill.generation import Sampling, TransformersEngine, generate, make_filters, prompts_of
from llm_distill.models import LanguageModel

VOCAB, LENGTHS = 8192, (8, 16, 24, 32, 48, 64)


def measure(rounds: int, count: int, new_tokens: int, batch: int) -> dict[str, Any]:
    files = load_corpus(max_characters=2_000_000)["train"]
    tokenizer = train_tokenizer(files, VOCAB)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            eos_token_id=None,
        )
    ).eval()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None  # nothing ends early: all write as much
    tokenizer.pad_token_id = 0
    text = "\n".join(row["text"] for row in files)
    size = len(text) // count
    starts = [
        tokenizer.decode(tokenizer(text[i * size : i * size + 400])["input_ids"][: LENGTHS[i % len(LENGTHS)]])
        for i in range(count)
    ]
    prompts = list(prompts_of({"prompt": start} for start in starts))
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    teacher = LanguageModel(model, tokenizer)

    def by_hand(batch: int = batch) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        ids = sorted((tokenizer(prompt.content)["input_ids"] for prompt in prompts), key=len, reverse=True)
        written = []
        with torch.inference_mode():
            for start in range(0, len(ids), batch):
                part = ids[start : start + batch]
                longest = max(map(len, part))
                inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
                mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
                output = model.generate(inputs, attention_mask=mask, generation_config=config)
                written += output[:, longest:].tolist()
        return written

    def ours() -> None:
        engine = TransformersEngine(teacher, sampling, batch_size=batch)
        with tempfile.TemporaryDirectory() as folder:
            filters = make_filters({"length": {}, "repetition": {"max_share": 1.0}, "exact_duplicates": {}})
            report = generate(engine, prompts, Path(folder, "generated"), filters=filters)
            assert report.tokens == len(prompts) * new_tokens

    def one_by_one() -> None:
        by_hand(batch=1)

    cases: dict[str, Callable[[], object]] = {"by hand": by_hand, "ours": ours, "one by one": one_by_one}
    by_hand()  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    ratios = {
        "ours / by hand, at most 1.1": [a / b for a, b in zip(seconds["ours"], seconds["by hand"], strict=True)],
        "one by one / ours, at least 3": [a / b for a, b in zip(seconds["one by one"], seconds["ours"], strict=True)],
    }
    return {
        "prompts": len(prompts),
        "new tokens": new_tokens,
        "batch": batch,
        "rows": {name: {"median": statistics.median(v), "by round": v} for name, v in {**seconds, **ratios}.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    result = measure(args.rounds, args.prompts, args.new_tokens, args.batch)
    lines = ["| | median | by round |", "|---|---:|---:|"]
    for name, row in result["rows"].items():
        unit = "" if "/" in name else " s"
        lines.append(f"| {name} | {row['median']:.2f}{unit} | {', '.join(f'{v:.2f}' for v in row['by round'])} |")
    table = "\n".join(lines)
    print(table)
    if args.output:
        about = machine("cpu")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps({"machine": about, **result}, indent=1) + "\n")
        where = f"{about['date']}, {about['device']}, {about['threads']} threads. `{about['command']}`"
        size = f"{result['prompts']} prompts, {result['new tokens']} new tokens each, batches of {result['batch']}."
        args.output.with_suffix(".md").write_text(f"# Generation\n\n{where}\n\n{size}\n\n{table}\n")


if __name__ == "__main__":
    main()

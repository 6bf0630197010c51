"""Teachers whose data stays at home: four sites teach one student, and only what they say of public texts travels.

    python recipes/federated.py                      # or: --mixture vote

Federated distillation (FedMD, arXiv:1910.03581; FedDF, arXiv:2006.07242). Each site trains a model on its own texts and
captures what it says about texts that all may see. The centre distils the mixture of these caches into one student,
from which the sites begin the next round. No text and no gradient leaves a site, and no single one decides.

Sites and centre are processes of their own that share nothing but a folder. A cache is signed by its site (Ed25519):
the manifest, and the hash of each of its files. The centre takes none that is not signed with the key that it knows. In
life the folder is a bucket or a dataset repository, and the keys come another way.

Here the domains are four parts of the embedded corpus, and the public texts are of none of them. It shows, in nats a
token on held-out text of each domain: each site alone, the student after each round, and a student of all data pooled,
which nobody could train; and the bytes that were sent. Some four minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher, TeacherCache
from llm_distill.cache import TopK
from llm_distill.cache.manifest import FILE
from llm_distill.capture.run import capture
from llm_distill.data.corpus import load_corpus, token_blocks, train_tokenizer
from llm_distill.data.prepare import prepare
from llm_distill.files import write_atomically
from llm_distill.heads import LMHead
from llm_distill.losses.likelihoods import token_log_likelihoods

DOMAINS = {
    "codecs": ("encodings",),
    "web": ("email", "html", "http", "json", "urllib", "wsgiref", "xml", "xmlrpc"),
    "tasks": ("asyncio", "concurrent", "multiprocessing"),
    "building": ("distutils", "ensurepip", "importlib", "venv"),
}
"""What each site has: packages of the standard library."""
SIGNATURE = "signature"
WAIT_SECONDS = 0.2
CENTRE = os.getppid()
"""The process that a site was started by, as long as it is there."""


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on, but for the seed."""

    rounds: int = 2
    vocab_size: int = 2048
    block: int = 128
    width: int = 96
    layers: int = 2
    site_blocks: int = 600
    public_blocks: int = 500
    heldout_blocks: int = 24
    site_steps: int = 250
    student_steps: int = 300
    batch: int = 8
    learning_rate: float = 3e-3
    k: int = 16


read_corpus = functools.cache(load_corpus)
"""Once for each process."""


def texts_of(packages: Sequence[str], split: str) -> Dataset:
    """The files of some packages; without one, those of none."""
    return read_corpus()[split].filter(
        lambda row: row["file"].partition("/")[0] in packages if packages else "/" not in row["file"]
    )


def blocks_of(packages: Sequence[str], split: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
    """So many blocks of tokens, the same in every process."""
    count = recipe.heldout_blocks if split == "test" else recipe.site_blocks if packages else recipe.public_blocks
    blocks = token_blocks(texts_of(packages, split), tokenizer, recipe.block).shuffle(seed=0)
    return blocks.select(range(min(count, len(blocks))))


def make_model(recipe: Recipe, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=recipe.block,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def make_config(recipe: Recipe, folder: Path, steps: int, **options: Any) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=32,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        bf16=None if torch.cuda.is_available() else False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},  # blocks of tokens already
        **options,
    )


def train(model: PreTrainedModel, tokenizer: Any, data: Dataset, args: DistillationConfig) -> None:
    DistillationTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer).train()


def losses_of(model: PreTrainedModel, heldout: dict[str, Dataset]) -> dict[str, float]:
    """In nats a token, on each domain."""
    head = LMHead.of(model.eval())
    return {
        name: -float(torch.cat(token_log_likelihoods(model, head, blocks["input_ids"])).mean())
        for name, blocks in heldout.items()
    }


def sign(folder: Path, key: Any) -> None:
    """Puts the site's signature beside its cache."""
    write_atomically(folder / SIGNATURE, key.sign(manifest_of(folder)))


def manifest_of(folder: Path) -> bytes:
    """What is signed: the manifest and the hash of each file that it names."""
    names = sorted(path.name for path in folder.glob("shard-*.parquet"))
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    return (folder / FILE).read_bytes() + json.dumps(dict(zip(names, hashes, strict=True))).encode()


def open_signed(folder: Path, public_key: bytes) -> TeacherCache:
    """A site's cache.

    Raises:
        ValueError: it is not signed with the site's key, or was changed afterwards.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify((folder / SIGNATURE).read_bytes(), manifest_of(folder))
    except (InvalidSignature, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} is not signed by its site, or was changed on the way: it is not learned from. Have the site "
            "send it again."
        ) from error
    return TeacherCache.open(folder)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def wait_for(path: Path) -> Path:
    """Until somebody has put it into the folder; whole, as it is renamed to this name last."""
    while not path.exists():
        if os.getppid() != CENTRE:
            sys.exit("the centre is gone")
        time.sleep(WAIT_SECONDS)
    return path


def run_site(name: str, shared: Path, home: Path, recipe: Recipe) -> None:
    """What happens at a site: its texts and its model stay in this process and `home`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    write_atomically(shared / f"{name}.key", key.public_key().public_bytes_raw())
    tokenizer = AutoTokenizer.from_pretrained(wait_for(shared / "tokenizer"))
    own, public = (blocks_of(packages, "train", tokenizer, recipe) for packages in (DOMAINS[name], ()))
    seed = 1 + list(DOMAINS).index(name)
    for number in range(1, recipe.rounds + 1):
        start = shared / f"student-{number - 1}"
        model = make_model(recipe, seed) if number == 1 else AutoModelForCausalLM.from_pretrained(wait_for(start))
        train(model, tokenizer, own, make_config(recipe, home / "own", recipe.site_steps, kd_weight=0.0, ce_weight=1.0))
        if number == 1:
            model.save_pretrained(home / "alone")
        data = prepare(tokenizer, make_config(recipe, home / "capture", 1), public)
        folder = home / f"round-{number}"
        capture(LiveTeacher(model, tokenizer), data, folder, TopK(recipe.k))
        sign(folder, key)
        folder.rename(shared / f"{name}-{number}")  # sent, whole or not at all


def run_centre(shared: Path, recipe: Recipe, mixture: str, sites: dict[str, Any]) -> list[dict[str, float]]:
    """Distils each round's caches into the student. Its losses after each."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer")
    public = blocks_of((), "train", tokenizer, recipe)
    heldout = {name: blocks_of(packages, "test", tokenizer, recipe) for name, packages in DOMAINS.items()}
    keys, student, after = dict[str, bytes](), make_model(recipe, seed=0), []
    for number in range(1, recipe.rounds + 1):
        for name, site in sites.items():
            while not (shared / f"{name}-{number}").exists():
                if site.poll():
                    raise RuntimeError(f"the site {name} ended with {site.returncode}: its log says why")
                time.sleep(WAIT_SECONDS)
        keys = keys or {name: (shared / f"{name}.key").read_bytes() for name in DOMAINS}  # there before the first cache
        caches = {name: open_signed(shared / f"{name}-{number}", keys[name]) for name in DOMAINS}
        teachers = [{"cache": cache.path, "name": name} for name, cache in caches.items()]
        args = make_config(recipe, shared.with_name("centre"), recipe.student_steps, teachers=teachers, mixture=mixture)
        train(student, tokenizer, public, args)
        after.append(losses_of(student, heldout))
        student.save_pretrained(shared / "sending")
        (shared / "sending").rename(shared / f"student-{number}")
    return after


def compare(shared: Path, homes: Path, recipe: Recipe) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The bounds, each on all domains: every site alone, and one student of all their data."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizer")
    heldout = {name: blocks_of(packages, "test", tokenizer, recipe) for name, packages in DOMAINS.items()}
    alone = {
        f"{name} alone": losses_of(AutoModelForCausalLM.from_pretrained(homes / name / "alone"), heldout)
        for name in DOMAINS
    }
    pooled = concatenate_datasets([blocks_of(packages, "train", tokenizer, recipe) for packages in DOMAINS.values()])
    model, steps = make_model(recipe, seed=0), recipe.site_steps * len(DOMAINS)
    train(model, tokenizer, pooled, make_config(recipe, homes / "pooled", steps, kd_weight=0.0, ce_weight=1.0))
    return alone, losses_of(model, heldout)


def as_table(rows: dict[str, dict[str, float]]) -> str:
    head = ["nats a token", *DOMAINS, "mean"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, losses in rows.items():
        values = [losses[domain] for domain in DOMAINS]
        lines.append([name, *(f"{value:.3f}" for value in [*values, sum(values) / len(values)])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def start_sites(folder: Path, recipe: Recipe) -> dict[str, subprocess.Popen[bytes]]:
    """A process for each, with a folder of its own."""
    command = [sys.executable, __file__, "--output_dir", str(folder), "--recipe", json.dumps(vars(recipe))]
    sites = {}
    for name in DOMAINS:
        home = folder / "homes" / name
        home.mkdir(parents=True)
        with (home / "log").open("w") as log:
            sites[name] = subprocess.Popen([*command, "--site", name], stdout=log, stderr=log)
    return sites


def bytes_sent(shared: Path, alone: Path, recipe: Recipe) -> dict[str, int]:
    """By the sites and to them in all rounds, and what it would have been with weights in place of caches."""
    rounds = range(1, recipe.rounds + 1)
    return {
        "caches_up": sum(bytes_in(shared / f"{name}-{number}") for name in DOMAINS for number in rounds),
        "weights_up": len(DOMAINS) * recipe.rounds * bytes_in(alone),
        "student_down": len(DOMAINS) * sum(bytes_in(shared / f"student-{number}") for number in rounds[:-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/federated"), help="a folder that is not there yet"
    )
    parser.add_argument("--mixture", choices=("mean", "vote", "best"), default="mean", help="of what the sites say")
    parser.add_argument("--site", choices=tuple(DOMAINS), help="what a site's own process is started with")
    parser.add_argument("--recipe", type=json.loads, default={}, help="other settings, as JSON")
    arguments = parser.parse_args()
    recipe, folder = Recipe(**arguments.recipe), arguments.output_dir
    shared, homes = folder / "shared", folder / "homes"
    logging.set_verbosity_error()
    if arguments.site:
        torch.set_num_threads(1)
        run_site(arguments.site, shared, homes / arguments.site, recipe)
        return
    if folder.exists():
        parser.error(f"{folder} is there already: remove it, or choose another --output_dir.")
    began = time.perf_counter()
    shared.mkdir(parents=True)
    sites = start_sites(folder, recipe)
    try:
        train_tokenizer(texts_of((), "train").select(range(60)), recipe.vocab_size).save_pretrained(shared / "making")
        (shared / "making").rename(shared / "tokenizer")
        after = run_centre(shared, recipe, arguments.mixture, sites)
    finally:
        for site in sites.values():
            site.terminate()
            site.wait()
    alone, pooled = compare(shared, homes, recipe)
    rows = alone | {f"student, round {number}": losses for number, losses in enumerate(after, 1)}
    rows["all data pooled"] = pooled
    sent, seconds = bytes_sent(shared, homes / next(iter(DOMAINS)) / "alone", recipe), time.perf_counter() - began
    megabytes = {name: f"{size / 1e6:.1f} MB" for name, size in sent.items()}
    table = f"{as_table(rows)}\n\n" + (
        f"The sites sent {megabytes['caches_up']} of caches; weights would be {megabytes['weights_up']}, and grow with "
        f"the model, which caches do not. To them went {megabytes['student_down']}, the student. Mixture: "
        f"{arguments.mixture}; {recipe.rounds} rounds; {seconds:.0f} s.\n"
    )
    results = {"recipe": vars(recipe), "mixture": arguments.mixture, "losses": rows, "bytes": sent, "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "results.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()

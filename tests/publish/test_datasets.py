"""A cache on the Hub: the real client, in a process of its own as a user has it, against a small Hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import PERSON, REPO, REVISION, TEACHER, TOKEN, Hub
from hub_server import python as run
from huggingface_hub import DatasetCard
from huggingface_hub.errors import HFValidationError

from llm_distill.cache import TeacherCache, TopK
from llm_distill.cache.codec import encode
from llm_distill.cache.manifest import identity, write_manifest
from llm_distill.cache.methods import describe_method
from llm_distill.cache.store import ShardWriter
from llm_distill.publish.datasets import cache_card

METHOD = TopK(k=16)


def make_cache(folder: Path, *, shards: int = 2, texts: int = 4, rows: int = 50, **fields: Any) -> TeacherCache:
    """Of random distributions over 512 tokens."""
    folder.mkdir(parents=True)
    manifest = {
        "teacher": {"model": TEACHER, "revision": REVISION, "dtype": "bfloat16", "bits": 4},
        "tokenizer": {"vocabulary": "5eed5eed5eed5eed", "chat_template": None},
        "vocab_size": 512,
        "temperature": 2.0,
        "method": describe_method(METHOD),
        "seed": None,
        "data": {"max_length": 1024, "packing": False},
        "fidelity": {"table": "| | bytes a token |\n|---|---:|\n| TopK | 31.4 |"},
        **fields,
    }
    write_manifest(folder, manifest)
    generator = torch.Generator().manual_seed(0)
    for shard in range(shards):
        writer = ShardWriter(folder, METHOD, identity(manifest))
        for text in range(texts):
            log_p = (3 * torch.randn(rows, 512, generator=generator)).log_softmax(-1)
            kept_tokens = METHOD(log_p, torch.rand(rows, 2, generator=generator))
            writer.add(hashlib.md5(f"{shard} {text}".encode()).digest(), rows, encode(METHOD, kept_tokens))
        writer.close()
    cache = TeacherCache(folder)
    cache.record_contents()
    return cache


PRELUDE = """
import os, sys, time, urllib.request
from llm_distill.cache import TeacherCache
from llm_distill.publish.datasets import push_cache

home, repo = sys.argv[1:]

def push(cache=home + "/cache", to=repo):
    try:
        print(push_cache(TeacherCache(cache), to))
    except (ValueError, ConnectionError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}")

def tell(what):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/{what}").read()
"""


def python(hub: Hub, home: Path, program: str, **more: str) -> list[str]:
    return run(hub, home, PRELUDE + textwrap.dedent(program), **more)


def test_a_pushed_cache_is_downloaded_and_decodes_to_the_same(hub: Hub, home: Path) -> None:
    make_cache(home / "cache")
    (home / "cache" / "fidelity.png").write_bytes(b"PNG")
    (home / "cache" / "head.safetensors").write_bytes(b"the head")
    (home / "cache" / ".partial-1.parquet").write_bytes(b"half a shard")
    (home / "cache" / "notes.txt").write_text(PERSON)
    printed = python(
        hub,
        home,
        """
        push()
        from llm_distill.cache.codec import decode
        local, pulled = TeacherCache(home + "/cache"), TeacherCache.open(repo)
        assert pulled.path != local.path and pulled.verify() == [] and pulled.manifest == local.manifest
        assert len(pulled) == len(local) == 8 and pulled.num_rows == 400
        for key, columns in local.examples():
            for mine, read in zip(decode(local.method, [columns]), decode(local.method, [pulled.load(key)])):
                assert mine.equal(read)
        print("the same")
        push()
        """,
    )
    url = f"{hub.url}/datasets/{REPO}"
    assert printed == [url, "the same", url]
    assert len(hub.commits) == 1, "nothing is pushed twice"
    assert hub.tokens == {f"Bearer {TOKEN}"}

    shards = {path.name for path in (home / "cache").glob("shard-*")}
    others = {".gitattributes", "README.md", "manifest.json", "fidelity.png", "head.safetensors"}
    assert len(shards) == 2
    assert hub.files[REPO].keys() == shards | others
    for name, content in hub.files[REPO].items():
        for secret in (TOKEN, PERSON, str(home.parent)):
            assert secret.encode() not in content, f"{secret} in {name}"
    card = DatasetCard(hub.files[REPO]["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert "The teacher's is apache-2.0" in card.text
    assert "![Fidelity and size](fidelity.png)" in card.text


def test_a_stream_reads_what_is_needed(hub: Hub, home: Path) -> None:
    cache = make_cache(home / "cache", texts=60, rows=400)
    hub.files[REPO] = {path.name: path.read_bytes() for path in (home / "cache").iterdir()}
    hub.files[REPO]["README.md"] = cache_card(cache, REPO, {}).encode()
    first = next(cache.examples())[0]
    program = f"""
        pulled = TeacherCache.open("hf://datasets/" + repo)
        tell("mark")
        pulled.load(bytes.fromhex("{first.hex()}"))
        tell("mark")
        local = TeacherCache(home + "/cache")
        assert len(pulled) == len(local) == 120 and pulled.num_rows == local.num_rows
        assert all(pulled.load(key) == columns for key, columns in local.examples()) and pulled.verify() == []

        from datasets import load_dataset
        rows = list(load_dataset(repo, split="train", streaming=True))
        assert {{row["key"] for row in rows}} == {{key for key, _ in local.examples()}}
        print(sum(row["rows"] for row in rows))
        """
    assert python(hub, home, program) == ["48000"]
    opened, first_read = hub.marks
    assert opened < 0.2 * cache.num_bytes, "footers"
    assert first_read - opened < 0.4 * cache.num_bytes, "one group of rows of one shard"


def test_a_teacher_of_whom_more_is_known_is_another_one(hub: Hub, home: Path) -> None:
    make_cache(home / "cache")
    make_cache(home / "other", teacher={"model": TEACHER, "revision": REVISION, "dtype": "bfloat16"})
    hub.files[REPO] = {path.name: path.read_bytes() for path in (home / "other").iterdir()}
    (refused,) = python(hub, home, "push()")
    assert "holds another teacher cache: teacher.bits: the cache has None, asked for is 4." in refused


def test_a_repository_of_something_else_is_left_alone(hub: Hub, home: Path) -> None:
    make_cache(home / "cache")
    make_cache(home / "other", temperature=1.0)
    hub.files[REPO] = {path.name: path.read_bytes() for path in (home / "other").iterdir()}
    hub.files["somebody/texts"] = {".gitattributes": b"", "README.md": b"mine", "train.jsonl": b"{}"}
    before = {repo: dict(files) for repo, files in hub.files.items()}
    printed = python(
        hub,
        home,
        """
        push()
        push(to="somebody/texts")
        push(cache="hf://datasets/" + repo, to="somebody/copy")
        """,
    )
    assert all(line.startswith("ValueError: ") for line in printed)
    another, texts, remote = printed
    assert "temperature: the cache has 1.0, asked for is 2.0. Choose another name" in another
    assert "somebody/texts is no teacher cache and has other things in it, such as train.jsonl" in texts
    assert "is not a local folder: download it" in remote
    assert hub.files == before


def test_what_a_person_must_do_is_said(hub: Hub, home: Path) -> None:
    assert issubclass(HFValidationError, ValueError)
    make_cache(home / "cache")
    damaged = make_cache(home / "damaged").shards[0].name
    content = bytearray((home / "damaged" / damaged).read_bytes())
    content[100] ^= 1
    (home / "damaged" / damaged).write_bytes(content)
    printed = python(
        hub,
        home,
        """
        push(to="others/cache")
        push(to="some body/cache")
        push(cache=home + "/damaged")
        del os.environ["HF_TOKEN"]
        push()
        import huggingface_hub.constants
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        push()
        """,
    )
    permission, name, damage, token, offline = printed
    for line in (permission, token):
        assert re.match(r"ValueError: the Hub does not let you write to \w+/cache\. Log in with `hf auth login`", line)
    assert re.match(r"HFValidationError: Repo id must use .*'some body/cache'", name)
    assert damage.startswith(f"ValueError: damaged, so not pushed: {damaged}.")
    assert offline.startswith("ConnectionError: ")
    assert "HF_HUB_OFFLINE" in offline
    assert not hub.commits


@pytest.mark.parametrize("transfer", ["several commits", "large files"])
def test_a_push_that_broke_off_goes_on(hub: Hub, home: Path, transfer: str) -> None:
    cache = make_cache(home / "cache", shards=4)
    shards = [shard.name for shard in cache.shards]
    hub.large = transfer == "large files"
    hub.cut = {shards[2]}
    printed = python(
        hub,
        home,
        """
        time.sleep = lambda seconds: None  # between attempts
        import huggingface_hub._upload_pipeline as pipeline
        pipeline.COMMIT_SIZE_SCALE[:] = [2] * len(pipeline.COMMIT_SIZE_SCALE)  # and not hundreds of files
        push()
        try:
            TeacherCache.open(repo)
        except ValueError as error:
            print(error)
        tell("mend")
        push()
        assert len(TeacherCache.open(repo)) == 16
        """,
        HF_HUB_DISABLE_XET=str(int(hub.large)),
    )
    broken, incomplete, url = printed
    if not hub.large:
        assert incomplete.startswith(f"{REPO} lacks 2 of its 4 shards")
    assert re.match(f"ConnectionError: the push to {REPO} broke off. What has arrived stays, .*the same push", broken)
    assert url == f"{hub.url}/datasets/{REPO}"
    assert TeacherCache(home / "cache").verify() == []
    assert hub.files[REPO].keys() == {".gitattributes", "README.md", "manifest.json", *shards}
    if hub.large:
        assert hub.puts == dict.fromkeys(shards, 1)
        assert len(hub.commits) == 1
    else:
        assert hub.commits == [["README.md", "manifest.json"], shards[:2], shards[2:]]


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / PERSON, texts=2000, rows=1, shards=1)
    card = DatasetCard(cache_card(cache, REPO, {"license": "other", "license_name": "qwen"}))
    data = card.data.to_dict()
    assert data["configs"] == [{"config_name": "default", "data_files": "shard-*.parquet"}]
    assert (data["license"], data["license_name"], data["size_categories"]) == ("other", "qwen", ["1K<n<10K"])
    assert {"llm-distill", "knowledge-distillation", "teacher-cache"} <= set(data["tags"])
    assert data["base_model"] == [TEACHER]
    for text in (
        f"| teacher | [{TEACHER}](https://huggingface.co/{TEACHER}), {REVISION}, bfloat16, 4 bits |",
        "| tokenizer: vocabulary | 5eed5eed5eed5eed |",
        "| kept of each distribution | `TopK(k=16, mass=1.0, threshold=0.0, step=0.0078125)` |",
        "| temperature | 2 |",
        "| texts | 2,000 |",
        "| tokens | 2,000 |",
        f"| bytes a token | {cache.num_bytes / 2000:.1f} |",
        "The teacher's is qwen.",
        "| TopK | 31.4 |",
        f"teacher_cache: {REPO}\nmax_length: 1024\npacking: false\n",
        f"`hf://datasets/{REPO}`",
    ):
        assert text in card.text, text
    assert PERSON not in str(card)


def test_the_card_of_teachers_of_one_s_own(tmp_path: Path) -> None:
    teachers = [{"model": "mine", "revision": None, "dtype": "float32"}, {"architecture": "LlamaForCausalLM"}]
    cache = make_cache(tmp_path / "cache", teacher={"ensemble": teachers, "weights": [0.5, 0.5]}, fidelity=None)
    card = DatasetCard(cache_card(cache, REPO, {}))
    assert {"license", "base_model"}.isdisjoint(card.data.to_dict())
    assert "The teacher's is not known here. It governs" in card.text
    assert "| teacher | `mine`, float32 |\n| teacher | `LlamaForCausalLM` |\n" in card.text
    assert "Fidelity" not in card.text

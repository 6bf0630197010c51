"""Federated distillation: a round of two sites in small, and what the centre does not learn from."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import federated
import pytest
import torch
from datasets import Dataset
from federated import DOMAINS, Recipe, open_signed, run_centre, run_site
from transformers import PreTrainedTokenizerBase

SMALL = Recipe(rounds=1, vocab_size=320, block=32, width=16, site_steps=2, student_steps=2, batch=2, k=4)


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, texts: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, list[dict[str, float]]]:
    """The folder after a round of two sites, and what the student's losses are then."""
    folder = tmp_path_factory.mktemp("federated")
    with pytest.MonkeyPatch.context() as patched:
        for other in list(DOMAINS)[2:]:
            patched.delitem(DOMAINS, other)
        patched.setattr(federated, "texts_of", lambda packages, split: texts.select(range(24)))
        (folder / "shared").mkdir()
        tokenizer.save_pretrained(folder / "shared" / "tokenizer")
        for name in DOMAINS:
            (folder / name).mkdir()
            run_site(name, folder / "shared", folder / name, SMALL)
        sites = {name: Mock(poll=Mock(return_value=None)) for name in DOMAINS}
        after = run_centre(folder / "shared", SMALL, "vote", sites)
    return folder / "shared", after


def test_only_caches_keys_and_the_student_are_in_the_shared_folder(shared: tuple[Path, list[dict[str, float]]]) -> None:
    folder, after = shared
    names = {path.name for path in folder.iterdir()}
    assert names == {"tokenizer", "codecs.key", "web.key", "codecs-1", "web-1", "student-1"}
    for site in ("codecs-1", "web-1"):
        assert {path.suffix for path in (folder / site).iterdir()} <= {".json", ".parquet", ".lock", ""}
    assert [*after[0]] == ["codecs", "web"]
    assert all(0 < loss < torch.inf for loss in after[0].values())


def test_a_cache_of_another_site_or_changed_on_the_way_is_not_learned_from(
    shared: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    folder, _ = shared
    keys = {name: (folder / f"{name}.key").read_bytes() for name in ("codecs", "web")}
    assert len(open_signed(folder / "web-1", keys["web"]))
    with pytest.raises(ValueError, match="is not signed by its site"):
        open_signed(folder / "web-1", keys["codecs"])
    shard = next((folder / "codecs-1").glob("shard-*.parquet"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="or was changed on the way"):
        open_signed(folder / "codecs-1", keys["codecs"])

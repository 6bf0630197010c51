"""A teacher behind a real vLLM is the teacher, through faults and deaths, in memory, in a cache and over the wire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_vllm import serving_vllm
from proxy import FAULTS, FaultyProxy
from runs import fill_cache, logged, make_trainer
from servers import RunningServer
from tiny import VOCAB
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from worker import make_rows

from llm_distill import DistillationTrainer, LiveTeacher, ServedTeacher, TeacherCache
from llm_distill.cache import TopK
from llm_distill.rows import View

FINE = 2**-17
"""Steps of √p in a cache whose losses are to be exact ones."""


@pytest.fixture(scope="session")
def default_server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A second vLLM, started without `--max-logprobs`; the last test that has it kills it."""
    with serving_vllm(served_model, tmp_path_factory.mktemp("log") / "vllm.log") as server:
        yield server


@pytest.fixture
def student(saved: Path) -> str:
    return str(saved / "student")


def losses(folder: Path, tokenizer: PreTrainedTokenizerBase, student: str, **options: Any) -> list[float]:
    trainer = make_trainer(folder, tokenizer, student, **({"max_steps": 4} | options))
    trainer.train()
    return logged(trainer, "loss")


def cached(folder: Path, tokenizer: PreTrainedTokenizerBase, student: str, teacher: Path, k: int) -> str:
    """The folder of a cache that the live teacher has filled with its top k."""
    trainer = make_trainer(folder, tokenizer, student, teacher_model_name_or_path=str(teacher))
    fill_cache(trainer, folder / "cache", TopK(k, step=FINE))
    return str(folder / "cache")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_live_cached_and_served_learn_the_same(
    tmp_path: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    served_model: Path,
    vllm_server: RunningServer,
    divergence: str,
) -> None:
    options: dict[str, Any] = {"divergence": divergence, "ce_weight": 0.2}
    live = losses(tmp_path / "a", tokenizer, student, teacher_model_name_or_path=str(served_model), **options)
    cache = cached(tmp_path, tokenizer, student, served_model, VOCAB)
    stored = losses(tmp_path / "b", tokenizer, student, teacher_cache=cache, **options)
    options |= {"teacher_server_url": vllm_server.url, "teacher_server_k": VOCAB}
    served = losses(tmp_path / "c", tokenizer, student, **options)
    print(f"{divergence}: live {live}, cached {stored}, served {served}")
    assert served == pytest.approx(live, rel=1e-4)
    assert stored == pytest.approx(live, rel=2e-3)


def test_the_top_k_served_is_the_top_k_cached(
    tmp_path: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    served_model: Path,
    vllm_server: RunningServer,
) -> None:
    cache = cached(tmp_path, tokenizer, student, served_model, 20)
    stored = losses(tmp_path / "a", tokenizer, student, teacher_cache=cache)
    served = losses(tmp_path / "b", tokenizer, student, teacher_server_url=vllm_server.url)
    live = losses(tmp_path / "c", tokenizer, student, teacher_model_name_or_path=str(served_model))
    assert served == pytest.approx(stored, rel=2e-3)
    assert all(part < whole for part, whole in zip(served, live, strict=True)), "k + 1 cells are a lower bound"


def test_one_number_a_token_is_the_live_teachers(
    tokenizer: PreTrainedTokenizerBase, served_model: Path, vllm_server: RunningServer
) -> None:
    live, served = LiveTeacher.load(str(served_model)), ServedTeacher(vllm_server.url, k=0)
    served.fit_to(tokenizer)
    texts = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    view = View.of({"input_ids": texts, "labels": texts})
    signal = live.score(view)
    log_p = signal.head(signal.hidden).log_softmax(-1).gather(-1, view.positions.targets[:, None])[:, 0]
    torch.testing.assert_close(served.score(view).log_probs, log_p, rtol=1e-4, atol=1e-4)


def test_a_run_ends_right_through_every_fault_that_passes(
    tmp_path: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    served_model: Path,
    vllm_server: RunningServer,
) -> None:
    options: dict[str, Any] = {"max_steps": 12}
    live = losses(tmp_path / "a", tokenizer, student, teacher_model_name_or_path=str(served_model), **options)
    passing = [fault for fault in FAULTS if fault != "other_model"]
    with FaultyProxy(vllm_server.url) as proxy:
        options |= {"teacher_server_url": proxy.url, "teacher_server_k": VOCAB}
        trainer = make_trainer(tmp_path / "b", tokenizer, student, **options)
        proxy.faults.extend([fault for each in passing for fault in (each, None, None)])
        trainer.train()
    assert set(proxy.met) == set(passing)
    assert logged(trainer, "loss") == pytest.approx(live, rel=1e-4)


def test_a_run_that_cannot_go_on_says_why_and_keeps_what_it_has(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, vllm_server: RunningServer
) -> None:
    with FaultyProxy(vllm_server.url) as proxy:
        options: dict[str, Any] = {"teacher_server_url": proxy.url, "dataloader_num_workers": 1}
        first = make_trainer(tmp_path, tokenizer, student, **options)
        first.train_dataset = make_rows([]).select(range(2))
        cache = fill_cache(first, tmp_path / "cache", TopK(20))
        options |= {"teacher_cache": str(cache.path), "on_miss": "live", "teacher_server_timeout": 2.0}
        options |= {"max_steps": 12, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(tmp_path, tokenizer, student, **options)
        proxy.faults.extend([None] * 12 + ["500"] * 1000)
        with pytest.raises(ConnectionError, match=f"no answer to /v1/completions in 2 seconds. {proxy.url}: HTTP 500"):
            trainer.train()
        assert list((tmp_path / "out").glob("checkpoint-*"))
        assert len(TeacherCache(cache.path)) > 2

        proxy.faults.clear()
        trainer = make_trainer(tmp_path / "again", tokenizer, student, teacher_server_url=proxy.url)
        proxy.faults.append("other_model")
        with pytest.raises(ValueError, match="'teacher' was asked, and 'another' has answered"):
            trainer.train()


def test_what_is_served_is_written_into_the_cache_and_needs_no_server_again(
    tmp_path: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    served_model: Path,
    vllm_server: RunningServer,
) -> None:
    served = {"teacher_server_url": vllm_server.url}
    half = make_trainer(tmp_path, tokenizer, student, **served)
    half.train_dataset = make_rows([]).select(range(12))
    cache = str(tmp_path / "served_cache")
    fill_cache(half, cache, TopK(20, step=FINE))
    options: dict[str, Any] = {"teacher_cache": cache, "max_steps": 12}
    grown = losses(tmp_path / "a", tokenizer, student, on_miss="live", **served, **options)
    assert len(TeacherCache(cache)) == 24
    assert losses(tmp_path / "b", tokenizer, student, **options) == pytest.approx(grown, rel=1e-6)
    options["teacher_cache"] = cached(tmp_path, tokenizer, student, served_model, 20)
    assert losses(tmp_path / "c", tokenizer, student, **options) == pytest.approx(grown, rel=2e-3)


def test_another_tokenizer_or_model_is_refused(
    saved: Path, vllm_server: RunningServer, tokenizer: PreTrainedTokenizerBase
) -> None:
    larger = AutoTokenizer.from_pretrained(saved / "student")
    larger.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"give different ids for ids \(320: '<new>' against '', …\)"):
        ServedTeacher(vllm_server.url).fit_to(larger)
    with pytest.raises(ValueError, match=r"serves 'teacher', not 'nope'"):
        ServedTeacher(vllm_server.url, "nope").fit_to(tokenizer)


def test_the_longest_text_that_is_allowed_is_answered(
    vllm_server: RunningServer, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = ServedTeacher(vllm_server.url)
    teacher.fit_to(tokenizer)
    tokens = torch.ones(1, teacher.max_length, dtype=torch.long)
    assert len(teacher.score(View.of({"input_ids": tokens, "labels": tokens}))) == 254


def test_vllms_limit_of_twenty_is_explained(tokenizer: PreTrainedTokenizerBase, default_server: RunningServer) -> None:
    ServedTeacher(default_server.url, k=20).fit_to(tokenizer)
    with pytest.raises(ValueError, match=r"teacher_server_k=21.*greater than max allowed: 20.*--max-logprobs 21"):
        ServedTeacher(default_server.url, k=21).fit_to(tokenizer)


class KillAfter(TrainerCallback):
    """Kills a server while the student trains."""

    def __init__(self, server: RunningServer, step: int) -> None:
        self.server, self.step = server, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.server.kill()


def test_one_of_two_servers_is_killed_and_the_run_goes_on(
    tmp_path: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    vllm_server: RunningServer,
    default_server: RunningServer,
) -> None:
    options: dict[str, Any] = {"max_steps": 24, "num_train_epochs": 2}
    alone = losses(tmp_path / "a", tokenizer, student, teacher_server_url=vllm_server.url, **options)
    with FaultyProxy(default_server.url) as counted:
        urls = f"{vllm_server.url},{counted.url}"
        trainer: DistillationTrainer = make_trainer(
            tmp_path / "b", tokenizer, student, teacher_server_url=urls, **options
        )
        trainer.add_callback(KillAfter(default_server, step=2))
        trainer.train()
    assert default_server.process.poll() is not None
    assert counted.passed > 3, "it had its share"
    assert logged(trainer, "loss") == pytest.approx(alone, rel=1e-4)

"""A teacher behind a server is the teacher, whatever goes wrong on the way; what does not fit is refused at the start.

The server here is a real model behind vLLM's protocol (`protocol_server.py`); tests/served has vLLM itself.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import protocol_server
import pytest
import torch
from datasets import Dataset
from proxy import FAULTS, FaultyProxy
from runs import counted_logits, first_batch, logged, make_trainer
from scripted import scripted
from servers import RunningServer, serving
from tiny import VOCAB, make_config, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from worker import make_rows

from llm_distill import CachedTeacher, DistillationTrainer, EnsembleTeacher, LiveTeacher, ServedTeacher, TeacherCache
from llm_distill.cache import Hidden, Hybrid, TopK
from llm_distill.capture.report import report_fidelity
from llm_distill.capture.run import capture
from llm_distill.cli import main
from llm_distill.config import DistillationConfig
from llm_distill.divergences import ForwardKL, ReverseKL
from llm_distill.losses.fused.logits import logits_in_chunks
from llm_distill.models import LanguageModel
from llm_distill.rows import IGNORED, WRITTEN, View
from llm_distill.teachers.served import fit_to_vocabulary, parse_urls, read_top_tokens

SCRIPT = Path(protocol_server.__file__)
Start = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def folders(saved: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Beside `teacher`: `padded`, with more logits than tokens, and `other`, with another tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    tiny_llama(2, vocab_size=VOCAB + 8).save_pretrained(folder / "padded")
    tokenizer.save_pretrained(folder / "padded")
    tiny_llama(2).save_pretrained(folder / "other")
    words = json.loads((saved / "teacher" / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer.save_pretrained(folder / "other")
    (folder / "other" / "tokenizer.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts a server over some folders."""
    with ExitStack() as running:

        def run(*models: Path, key: str = "", max_logprobs: int = VOCAB) -> RunningServer:
            log = tmp_path_factory.mktemp("log") / "server.log"
            command = [sys.executable, SCRIPT, "PORT", key, str(max_logprobs), *models]
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return running.enter_context(serving(command, log, headers=headers))

        yield run


@pytest.fixture(scope="module")
def server(start: Start, saved: Path) -> str:
    """Where the teacher of `saved` is served."""
    return start(saved / "teacher").url


@pytest.fixture(scope="module")
def several(start: Start, saved: Path, folders: Path) -> str:
    """Where three models are served."""
    return start(saved / "teacher", folders / "other", folders / "padded", max_logprobs=64).url


@pytest.fixture
def student(saved: Path) -> str:
    return str(saved / "student")


def train(folder: Path, tokenizer: PreTrainedTokenizerBase, student: str, **options: Any) -> DistillationTrainer:
    trainer = make_trainer(folder, tokenizer, student, **({"max_steps": 4} | options))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def live_losses(
    tmp_path_factory: pytest.TempPathFactory, saved: Path, tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    folder, student = tmp_path_factory.mktemp("live"), str(saved / "student")
    return logged(train(folder, tokenizer, student, teacher_model_name_or_path=str(saved / "teacher")), "loss")


def top_k_losses(folder: Path, tokenizer: PreTrainedTokenizerBase, student: str, teacher: Path, k: int) -> list[float]:
    """Of a run from a cache that the live teacher has filled."""
    cache = str(folder / "exact_cache")
    trainer = make_trainer(folder, tokenizer, student, teacher_model_name_or_path=str(teacher))
    capture(trainer.teacher, trainer.data, cache, TopK(k, step=2**-17))
    return logged(train(folder / "cached", tokenizer, student, teacher_cache=cache), "loss")


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl", "ce_weight": 0.3},
        {"divergence": "reverse_kl", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"divergence": "jsd", "train_sampling_strategy": "random", "dataloader_num_workers": 1},
        {"on_policy_share": 0.5, "max_completion_length": 5, "gradient_accumulation_steps": 2},
    ],
    ids=["forward_kl", "accumulation", "shuffled", "on-policy"],
)
def test_the_whole_vocabulary_served_is_live_step_for_step(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str, options: dict[str, Any]
) -> None:
    live = train(tmp_path / "a", tokenizer, student, teacher_model_name_or_path=str(saved / "teacher"), **options)
    served = train(tmp_path / "b", tokenizer, student, teacher_server_url=server, teacher_server_k=VOCAB, **options)
    for name in ("loss", "kd", "top1_agreement"):
        assert logged(served, name) == pytest.approx(logged(live, name), rel=1e-4), name
    assert all(0 < share < 1 for share in logged(served, "data_share"))


ONE_NUMBER = {"teacher_server_k": 0, "divergence": "reverse_kl", "on_policy_share": 1.0, "max_completion_length": 5}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_one_number_a_token_is_the_policy_gradient_on_the_students_text(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str, share: float
) -> None:
    plain = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "max_steps": 1, "seed": 3}
    batches = {"per_device_train_batch_size": 8, "eval_strategy": "no"}
    ce_weight = 0.3 if share < 1 else 0.0
    options = plain | batches | ONE_NUMBER | {"on_policy_share": share, "ce_weight": ce_weight}
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_server_url=server, **options)
    (batch,) = trainer.policy(iter([[next(iter(trainer.get_train_dataloader()))]]), 0)
    trainer.policy.log()
    trainer.train()

    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (student, saved / "teacher")]
    inputs, labels = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"][:, 1:]
    log_q, log_p = (
        model.requires_grad_(model is models[0])(**inputs)
        .logits[:, :-1]
        .log_softmax(-1)
        .gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        for model in models
    )
    own, counts = batch[WRITTEN][:, None].expand_as(labels), labels != IGNORED
    advantages = (log_p - log_q).clamp(-10, 10).detach()
    loss = torch.where(own, -advantages * log_q, -ce_weight * log_q)[counts].mean()
    loss.backward()
    for (name, weight), trained in zip(models[0].named_parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(trained.data, weight.data - weight.grad, rtol=1e-3, atol=2e-5, msg=name)
    assert logged(trainer, "kd") == pytest.approx([float(-advantages[own & counts].mean())], rel=1e-4)
    assert logged(trainer, "teacher_ce") == pytest.approx([float(-log_p[counts].mean())], rel=1e-4)
    figures = trainer.evaluate(trainer.train_dataset)
    assert figures["eval_teacher_ce"] > 0
    assert "eval_loss" not in figures, "of this text the teacher says nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy_share": 0.0, "max_completion_length": 256}, "teaches on what the student wrote"),
        ({"on_policy_share": 0.5}, "set ce_weight for that text"),
        ({"sampling_temperature": 0.7}, "samples from its own distribution"),
        ({"top_k": 5, "steps_per_generation": 2}, "leave out top_k, steps_per_generation"),
        ({"divergence": "jsd"}, "gives the gradient of reverse_kl"),
        ({"on_policy_divergence": "skew_reverse_kl"}, "gives the gradient of reverse_kl"),
        ({"loss_temperature": 2.0}, "gives the gradient of reverse_kl"),
    ],
)
def test_one_number_a_token_is_refused_where_it_tells_nothing(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, student, teacher_server_url="http://nobody", **(ONE_NUMBER | options))


def test_the_top_k_served_is_the_top_k_cached(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    served = train(tmp_path, tokenizer, student, teacher_server_url=server)
    cached = top_k_losses(tmp_path, tokenizer, student, saved / "teacher", k=20)
    assert logged(served, "loss") == pytest.approx(cached, rel=2e-3)


def test_packed_documents_are_asked_one_by_one(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, texts: Dataset, server: str
) -> None:
    losses = []
    for teacher in (
        {"teacher_model_name_or_path": str(saved / "teacher")},
        {"teacher_server_url": server, "teacher_server_k": VOCAB},
    ):
        trainer = DistillationTrainer(
            model=student,
            args=make_config(
                tmp_path / "out", max_length=127, packing=True, packing_strategy="bfd", max_steps=3, **teacher
            ),
            train_dataset=texts.select(range(40)),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append(logged(trainer, "kd"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_check_asks_a_few_texts_and_says_what_cannot_be_compared(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, texts: Dataset, server: str
) -> None:
    trainer = DistillationTrainer(
        model=student,
        args=make_config(tmp_path / "out", teacher_server_url=server, teacher_server_k=8),
        train_dataset=texts.select(range(8)),
        processing_class=tokenizer,
    )
    findings = {finding.what: finding for finding in trainer.check().findings}
    assert (findings["teacher"].level, findings["time"].level, findings["divergence"].level) == (
        "green",
        "green",
        "green",
    )
    assert findings["loss"].level == "skipped"
    assert "a part of its distribution" in findings["loss"].text


def test_evaluation_asks_too(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    figures = []
    for teacher in (
        {"teacher_model_name_or_path": str(saved / "teacher")},
        {"teacher_server_url": server, "teacher_server_k": VOCAB},
    ):
        trainer = make_trainer(tmp_path, tokenizer, student, kd_weight=0.0, ce_weight=1.0, **teacher)
        figures.append(trainer.evaluate(make_rows([]))["eval_kd"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


def test_exactly_the_top_k_and_the_mass_of_the_others(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_model_name_or_path=str(saved / "teacher"))
    batch = first_batch(trainer)
    log_p = _log_p(trainer.teacher, batch)
    served = ServedTeacher(server, k=7)
    served.fit_to(tokenizer)
    signal = served.score(View.of(batch))
    top = log_p.topk(7)
    assert torch.equal(signal.ids.sort(-1).values, top.indices.sort(-1).values)
    assert torch.allclose(signal.log_probs, log_p.gather(-1, signal.ids), atol=1e-5)
    outside = log_p.scatter(-1, signal.ids, -torch.inf).double().logsumexp(-1)
    assert torch.allclose(signal.log_tail.double(), outside, atol=1e-5)


def test_it_is_asked_about_what_the_teacher_reads_in_place_of_the_student(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_model_name_or_path=str(saved / "teacher"))
    batch = dict(first_batch(trainer))
    more = {name: torch.nn.functional.pad(batch[name], (3, 0), value=1) for name in ("input_ids", "attention_mask")}
    more["labels"] = torch.nn.functional.pad(batch["labels"], (3, 0), value=-100)
    more["labels"][:, 3] = -100  # nothing predicts the student's first token
    served = ServedTeacher(server, k=7)
    served.fit_to(tokenizer)
    signal = served.score(View.of_teacher(served.read(batch | {"teacher": more})))
    expected = _log_p(trainer.teacher, more).topk(7)
    assert torch.allclose(signal.log_probs.sort(-1).values, expected.values.sort(-1).values, atol=1e-5)


def test_logits_past_the_tokenizer_take_no_part(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, start: Start, folders: Path
) -> None:
    """Those that are named are dropped, and the others divided by what is left; the few that are not stay outside."""
    k, options = 300, {"teacher_model_name_or_path": str(folders / "padded")}
    live = train(tmp_path / "a", tokenizer, student, **options)
    url = start(folders / "padded", max_logprobs=k).url
    teacher, batch = ServedTeacher(url, k=k), first_batch(live)
    teacher.fit_to(tokenizer)
    signal = teacher.score(View.of(batch))
    assert int(signal.ids.max()) < VOCAB
    assert torch.allclose(signal.log_probs.exp().sum(-1) + signal.log_tail.exp(), torch.ones(len(signal)), atol=1e-5)

    everything = counted_logits(live.teacher.model, batch).log_softmax(-1)
    top = everything.topk(k)
    lost = (top.values.exp() * (top.indices >= VOCAB)).sum(-1, keepdim=True)
    assert lost.max() > 0, "or nothing was tested"
    expected, there = everything.gather(-1, signal.ids) - torch.log1p(-lost), signal.log_probs.isfinite()
    assert torch.allclose(signal.log_probs[there], expected[there], atol=1e-5)
    served = train(tmp_path / "b", tokenizer, student, teacher_server_url=url, teacher_server_k=k)
    assert logged(served, "loss") == pytest.approx(logged(live, "loss"), rel=0.05)


def test_a_row_without_a_token_of_the_student_is_refused() -> None:
    with pytest.raises(ValueError, match="likeliest tokens are all past the 4"):
        fit_to_vocabulary(np.array([[5, 6]]), np.log([[0.5, 0.4]]), 4)


def test_a_token_of_the_text_outside_the_top_belongs_to_the_tail() -> None:
    tokens = [None, {"9": {"logprob": -5.0, "rank": 77}, "3": {"logprob": -0.5, "rank": 1}}]
    ids, log_p = read_top_tokens(tokens, np.array([1]), 2)
    log_p, tail = fit_to_vocabulary(ids, log_p, 10)
    assert ids[0, 0] == 3
    assert log_p.tolist() == [[-0.5, -np.inf]]
    assert tail[0] == pytest.approx(np.log(1 - np.exp(-0.5)))


def test_mass_that_rounding_hides_is_little_and_not_none() -> None:
    _, tail = fit_to_vocabulary(np.array([[0, 1], [0, 1]]), np.log([[0.5, 0.5 + 1e-9], [0.5, 0.4]]), 3)
    assert -20 < tail[0] < -16
    _, nothing = fit_to_vocabulary(np.array([[0, 1]]), np.log([[0.5, 0.5]]), 2)
    assert nothing[0] == -np.inf


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "other_model"])
def test_faults_that_pass_change_nothing(
    tmp_path: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    server: str,
    live_losses: list[float],
    fault: str,
) -> None:
    with FaultyProxy(server) as proxy:
        options = {"teacher_server_url": proxy.url, "teacher_server_k": VOCAB, "max_steps": 4}
        trainer = make_trainer(tmp_path, tokenizer, student, **options)
        proxy.faults.extend([fault, None, fault, fault])
        trainer.train()
    assert proxy.met[fault] == 3
    assert logged(trainer, "loss") == pytest.approx(live_losses, rel=1e-4)


def test_retry_after_is_honoured(saved: Path, tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    with FaultyProxy(server, retry_after=1.5) as proxy:
        teacher = ServedTeacher(proxy.url)
        teacher.fit_to(tokenizer)
        proxy.faults.append("429")
        teacher.score(View.of(_batch([[1, 2, 3]])))
        assert proxy.times[-1] - proxy.times[-2] > 1.5


def test_an_outage_that_lasts_ends_the_run_and_says_why(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    with FaultyProxy(server) as proxy:
        options = {"teacher_server_url": proxy.url, "teacher_server_timeout": 2.0, "dataloader_num_workers": 1}
        options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 12}
        trainer = make_trainer(tmp_path, tokenizer, student, **options)
        proxy.faults.extend([None] * 12 + ["500"] * 1000)
        with pytest.raises(ConnectionError, match=rf"no answer to /v1/completions in 2 sec.*{proxy.url}: HTTP 500"):
            trainer.train()
    assert list((tmp_path / "out").glob("checkpoint-*")), "what was learned until then stays"


def test_an_answer_of_another_model_is_refused(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    with FaultyProxy(server) as proxy:
        trainer = make_trainer(tmp_path, tokenizer, student, teacher_server_url=proxy.url)
        proxy.faults.append("other_model")
        with pytest.raises(ValueError, match="'teacher' was asked, and 'another' has answered"):
            trainer.train()


def in_every_row(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A lie: of an answer, all rows but the first are changed."""

    def lie(answer: Any) -> Any:
        first, *rows = answer["choices"][0]["prompt_logprobs"]
        answer["choices"][0]["prompt_logprobs"] = [first, *map(change, rows)]
        return answer

    return lie


def with_log_probs(change: Callable[[float], float]) -> Callable[[Any], Any]:
    return in_every_row(
        lambda row: {token: {**cell, "logprob": change(cell["logprob"])} for token, cell in row.items()}
    )


def with_next_token(answer: Any) -> Any:
    """The probabilities of each row, given to other tokens."""
    rows = answer["choices"][0]["prompt_logprobs"]
    for row in rows[1:]:
        cells = deque(row.values())
        cells.rotate(1)
        row.update(zip(row, cells, strict=True))
    return answer


LIES = {
    "logits": (with_log_probs(lambda log_p: log_p + 7), "are not the natural logarithms .* Are they logits"),
    "low_logits": (with_log_probs(lambda log_p: log_p - 12), "are not the natural logarithms"),
    "probabilities": (with_log_probs(math.exp), "are not the natural logarithms"),
    "base_2": (with_log_probs(lambda log_p: log_p / math.log(2)), "are not the natural logarithms"),
    "base_10": (with_log_probs(lambda log_p: log_p / math.log(10)), "are not the natural logarithms"),
    "nan": (with_log_probs(lambda _: math.nan), "it gave NaN"),
    "text": (with_log_probs(lambda _: "high"), "a row that cannot be read"),
    "no_row": (in_every_row(lambda _: None), "a row that cannot be read"),
    "few_tokens": (in_every_row(lambda row: dict([*row.items()][:5])), "fewer than the 20 likeliest tokens"),
    "ids": (in_every_row(lambda row: {**row, "99999999": {"logprob": -1.0, "rank": 1}}), "the token 99999999"),
    "other_text": (in_every_row(lambda row: {f"{int(t) + 400}": cell for t, cell in row.items()}), "not of the token"),
    "too_short": (lambda answer: answer["choices"][0]["prompt_logprobs"].pop() and answer, "gives no prompt_logprobs"),
    "no_choice": (lambda answer: {**answer, "choices": [7]}, "gives no prompt_logprobs for the"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_no_model_says_is_refused_at_the_start_and_later(
    tokenizer: PreTrainedTokenizerBase, server: str, lie: str
) -> None:
    change, message = LIES[lie]
    with FaultyProxy(server, [change]) as proxy:
        with pytest.raises(ValueError, match=f"{proxy.url}: .*{message}"):
            ServedTeacher(proxy.url).fit_to(tokenizer)
        teacher = ServedTeacher([server, proxy.url])
        teacher.fit_to(tokenizer)
        proxy.faults.extend([change] * 20)
        with pytest.raises(ValueError, match=f"{proxy.url}: .*{message}"):
            teacher.score(View.of(_batch([[5, 6, 7, 8, 9]] * 20)))


@pytest.mark.parametrize("lie", [lambda log_p: -log_p, lambda _: math.nan])
def test_one_number_a_token_must_be_the_logarithm_of_a_probability(
    tokenizer: PreTrainedTokenizerBase, server: str, lie: Callable[[float], float]
) -> None:
    with (
        FaultyProxy(server, [with_log_probs(lie)]) as proxy,
        pytest.raises(ValueError, match=f"{proxy.url}: .*what is no logarithm of a probability"),
    ):
        ServedTeacher(proxy.url, k=0).fit_to(tokenizer)


def test_servers_that_contradict_each_other_are_refused(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    with (
        FaultyProxy(server, [with_next_token]) as proxy,
        pytest.raises(
            ValueError, match=rf"{server} and {proxy.url} both serve 'teacher'.* \(\d\.\d+ nats a token apart\)"
        ),
    ):
        ServedTeacher([server, proxy.url]).fit_to(tokenizer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"models": []}, "it lists no models: is it vLLM"),
        ({"data": [{"id": "a", "max_model_len": "long"}], "model": "a"}, "gives no prompt_logprobs for the"),
    ],
    ids=["models", "rows"],
)
def test_what_is_no_server_of_a_teacher_is_refused(
    tokenizer: PreTrainedTokenizerBase, answer: Any, message: str
) -> None:
    with scripted([(200, answer)]) as server, pytest.raises(ValueError, match=f"{server.url}: .*{message}"):
        ServedTeacher(server.url).fit_to(tokenizer)


def test_the_time_allowed_is_that_of_the_start_too(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    with FaultyProxy(server, ["slow"] * 9, slow_seconds=20) as proxy:
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=proxy.url):
            ServedTeacher(proxy.url, timeout=0.5).fit_to(tokenizer)
        assert time.monotonic() - began < 10


def test_one_of_two_servers_dies_and_the_run_goes_on(
    tmp_path: Path,
    saved: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    server: str,
    live_losses: list[float],
) -> None:
    doomed = start(saved / "teacher")
    urls = f"{server},{doomed.url}/v1"
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_server_url=urls, teacher_server_k=VOCAB, max_steps=4)
    doomed.kill()
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(live_losses, rel=1e-4)


def test_work_is_shared_and_a_dead_server_is_told_of_once(
    tokenizer: PreTrainedTokenizerBase, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(server) as one, FaultyProxy(server) as two:
        teacher = ServedTeacher([one.url, two.url])
        teacher.fit_to(tokenizer)
        batch = _batch([[1, 2, 3, 4]] * 20)
        teacher.score(View.of(batch))
        assert min(one.passed, two.passed) > 5
        two.faults.extend(["reset"] * 1000)
        with caplog.at_level(logging.WARNING, "llm_distill"):
            for _ in range(5):
                teacher.score(View.of(batch))
    assert [record.message.split(" fails")[0] for record in caplog.records] == [f"the teacher's server {two.url}"]
    assert "1 others go on" in caplog.text
    assert two.met["reset"] < 30, "a dead server is left alone for longer each time"


def test_a_server_that_is_down_is_said_within_seconds(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=f"the teacher's server cannot be reached: {url} .*refused"):
        make_trainer(tmp_path, tokenizer, student, teacher_server_url=url)
    assert time.monotonic() - began < 10


def test_a_fault_at_the_start_passes_too(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    with FaultyProxy(server, ["500", "reset"]) as proxy:
        ServedTeacher(proxy.url).fit_to(tokenizer)
        assert sum(proxy.met.values()) == 2
        proxy.faults.extend(["500"] * 3)
        with pytest.raises(ConnectionError, match=rf"{proxy.url} \(HTTP 500 \(injected\)\)"):
            ServedTeacher(proxy.url).fit_to(tokenizer)


def test_a_refusal_does_not_wait_for_the_other_requests(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    with FaultyProxy(server, slow_seconds=20) as proxy:
        teacher = ServedTeacher(proxy.url)
        teacher.fit_to(tokenizer)
        proxy.faults.extend(["slow", "other_model"])
        began = time.monotonic()
        with pytest.raises(ValueError, match="'another' has answered"):
            teacher.score(View.of(_batch([[1, 2, 3], [4, 5, 6]])))
        assert time.monotonic() - began < 10


def test_one_of_two_servers_is_down_at_the_start(
    tokenizer: PreTrainedTokenizerBase, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = ServedTeacher(f"{server},http://127.0.0.1:9")
    teacher.fit_to(tokenizer)
    assert "127.0.0.1:9" in caplog.text
    assert len(teacher.score(View.of(_batch([[1, 2, 3]])))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nope"}, r"serves 'teacher', 'other', 'padded', not 'nope'. Name one of those"),
        ({}, r"serves 'teacher', 'other', 'padded', and no model was named"),
        ({"model": "other"}, r"give different ids for ids \(\d+: 'a' against 'b', \d+: 'b' against 'a', …\)"),
        ({"model": "teacher", "k": 65}, r"greater than max allowed: 64 .*--max-logprobs 65"),
        ({"model": "teacher", "k": VOCAB + 1}, r"k = 321 is larger than the vocabulary of 320"),
    ],
    ids=["model", "no_model", "tokenizer", "max_logprobs", "vocabulary"],
)
def test_what_does_not_fit_is_refused_at_the_start(
    tokenizer: PreTrainedTokenizerBase, several: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ServedTeacher(several, **options).fit_to(tokenizer)


def test_a_text_past_the_servers_context_is_refused(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    teacher = ServedTeacher(server)
    assert teacher.max_length == 127  # of 128 positions, one for the token that is always written
    teacher.fit_to(tokenizer)
    with pytest.raises(ValueError, match="a sequence of 128 tokens, longer than the teacher's context of 127"):
        teacher.score(View.of(_batch([[1] * 128])))


def test_the_key_comes_from_the_environment_and_is_never_shown(
    saved: Path, tokenizer: PreTrainedTokenizerBase, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = start(saved / "teacher", key="a-good-key").url
    monkeypatch.setenv("OPENAI_API_KEY", "a-good-key")
    teacher = ServedTeacher(url)
    teacher.fit_to(tokenizer)
    assert "a-good-key" not in repr(vars(teacher)) + repr(vars(teacher._servers)) + json.dumps(teacher.describe())
    monkeypatch.setenv("OPENAI_API_KEY", "a-bad-key")
    with pytest.raises(ValueError, match=f"{url} refuses the key in OPENAI_API_KEY") as error:
        ServedTeacher(url).fit_to(tokenizer)
    assert "a-bad-key" not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match=r"to answer without a key .OPENAI_API_KEY is not set"):
        ServedTeacher(url).fit_to(tokenizer)


def test_addresses() -> None:
    assert parse_urls(" http://a:1/v1/, https://b ,http://a:1") == ("http://a:1", "https://b")
    for bad in ("a:8000", "ftp://a", "", "http://"):
        with pytest.raises(ValueError, match="server's address"):
            parse_urls(bad)
    with pytest.raises(ValueError, match="Give the key in the environment") as error:
        parse_urls("http://user:secret@a:8000")
    assert "secret" not in str(error.value)


def test_a_teacher_travels_to_other_processes(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    teacher = ServedTeacher(server)
    teacher.fit_to(tokenizer)
    batch = _batch([[1, 2, 3]])
    assert torch.equal(pickle.loads(pickle.dumps(teacher)).score(View.of(batch)).ids, teacher.score(View.of(batch)).ids)


def test_a_batch_in_which_nothing_counts(tokenizer: PreTrainedTokenizerBase, server: str) -> None:
    teacher = ServedTeacher(server)
    teacher.fit_to(tokenizer)
    assert len(teacher.score(View.of({**_batch([[1, 2, 3]]), "labels": torch.full((1, 3), -100)}))) == 0


def test_a_temperature_is_refused(server: str) -> None:
    with pytest.raises(ValueError, match=r"at temperature 1.0 and cannot serve loss_temperature=2.0"):
        ServedTeacher(server).check(ForwardKL(), 2.0)
    with pytest.raises(ValueError, match="which is no distribution to mix"):
        EnsembleTeacher([ServedTeacher(server, k=0)]).check(ReverseKL(), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_server_k": 5}, "teacher_server_k .there is no teacher_server_url."),
        ({"teacher_server_timeout": 5.0}, "teacher_server_timeout .there is no teacher_server_url."),
        ({"teacher_server_url": "http://a", "teacher_load_in_4bit": True}, "teacher_server_url has loaded the teacher"),
        ({"teacher_server_url": "http://a", "teacher_model_revision": "x"}, "teacher_server_url has loaded"),
        ({"teacher_server_url": "http://a", "teacher_adapters_off": True}, "teacher_server_url is the teacher"),
        ({"teacher_server_url": "http://a", "teacher_server_k": -1}, "teacher_server_k must not be negative, got -1"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_answers_are_fetched_ahead_unless_nobody_asks(config: Callable[..., DistillationConfig]) -> None:
    assert config(teacher_server_url=["http://a", "http://b"]).teacher_server_url == "http://a,http://b"
    assert config(teacher_server_url="http://a").dataloader_num_workers == 2
    assert config(teacher_server_url="http://a", dataloader_num_workers=1).dataloader_num_workers == 1
    assert config().dataloader_num_workers == 0


def test_who_is_asked_must_be_clear(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    teacher = LiveTeacher(tiny_llama(2), tokenizer)
    with pytest.raises(ValueError, match="two teachers, a LiveTeacher and teacher_server_url"):
        make_trainer(tmp_path, tokenizer, student, teacher, teacher_server_url=server)


def test_what_a_server_says_is_captured_and_added_to(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, start: Start, saved: Path
) -> None:
    """Half is captured, the rest written through in a run, and a second run needs no server."""
    running, cache = start(saved / "teacher"), str(tmp_path / "cache")
    served = {"teacher_server_url": running.url, "teacher_model_name_or_path": "teacher", "max_steps": 12}
    half = make_trainer(tmp_path, tokenizer, student, **served)
    rows = replace(half.data, train=make_rows([]).select(range(12)))
    captured = capture(half.teacher, rows, cache, TopK(20, step=2**-17))
    assert len(captured) == 12
    report_fidelity(half.teacher, LanguageModel(half.model, tokenizer), rows, captured)
    with pytest.raises(ValueError, match="the teacher would not be asked, because there is a teacher_cache"):
        make_trainer(tmp_path, tokenizer, student, teacher_cache=cache, **served)
    grown = train(tmp_path / "a", tokenizer, student, teacher_cache=cache, on_miss="live", **served)
    assert len(TeacherCache(cache)) == 24
    running.kill()
    alone = train(tmp_path / "b", tokenizer, student, teacher_cache=cache, max_steps=12)
    assert logged(alone, "loss") == pytest.approx(logged(grown, "loss"), rel=1e-6)
    live = top_k_losses(tmp_path / "c", tokenizer, student, saved / "teacher", k=20)
    assert logged(alone, "loss")[:4] == pytest.approx(live, rel=2e-3)


def test_what_was_answered_before_an_outage_is_in_the_cache(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    with FaultyProxy(server) as proxy:
        options = {"teacher_server_url": proxy.url, "teacher_server_timeout": 2.0, "dataloader_num_workers": 1}
        some = make_trainer(tmp_path, tokenizer, student, **options)
        rows = replace(some.data, train=make_rows([]).select(range(2)))
        cache = capture(some.teacher, rows, tmp_path / "cache", TopK(20))
        options |= {"teacher_cache": str(cache.path), "on_miss": "live", "max_steps": 12}
        trainer = make_trainer(tmp_path, tokenizer, student, **options)
        proxy.faults.extend([None] * 10 + ["reset"] * 1000)
        with pytest.raises(ConnectionError, match="no answer"):
            trainer.train()
    assert len(TeacherCache(cache.path)) > 2


def test_the_command_line_captures_from_a_server(
    tmp_path: Path, student: str, server: str, texts: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    texts.select(range(12)).to_json(tmp_path / "texts.jsonl")
    command = ["capture", "--model_name_or_path", student, "--dataset_name", str(tmp_path / "texts.jsonl")]
    command += ["--teacher_server_url", server, "--output_dir", str(tmp_path / "out"), "--max_length", "64"]
    command += ["--bf16", "false", "--report_to", "none", "--teacher_cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit):
        main([*command, "--cache_kwargs", "{k: 32}"])
    message = "TopK(k=32, mass=1.0, threshold=0.0, step=0.0078125) keeps more than the 20 likeliest"
    assert message in capsys.readouterr().err
    main(command)
    assert len(TeacherCache(tmp_path / "cache")) == 12
    assert TeacherCache(tmp_path / "cache").manifest["teacher"] == {"model": "teacher", "served": "vllm", "k": 20}
    assert "Its fidelity is not measured" in capsys.readouterr().out


@pytest.mark.parametrize("method", [TopK(21), Hybrid(0.05), Hidden()], ids=str)
def test_more_than_the_top_k_cannot_be_captured(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str, method: Any
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_server_url=server)
    with pytest.raises(ValueError, match="keeps more than the 20 likeliest tokens"):
        capture(trainer.teacher, trainer.data, tmp_path / "cache", method)
    assert not (tmp_path / "cache").exists()


def test_more_than_the_top_k_cannot_be_added(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, server: str
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_server_url=server, teacher_server_k=30)
    cache = capture(trainer.teacher, trainer.data, tmp_path / "cache", TopK(30))
    with pytest.raises(ValueError, match="keeps more than the 20 likeliest tokens"):
        CachedTeacher(cache, "live", ServedTeacher(server, k=20))


def test_a_request_that_hangs_is_asked_again(server: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with FaultyProxy(server, slow_seconds=30) as proxy:
        teacher = ServedTeacher(proxy.url, timeout=8)
        teacher.fit_to(tokenizer)
        proxy.faults.append("slow")
        began = time.monotonic()
        teacher.score(View.of(_batch([[1, 2, 3]])))
        assert time.monotonic() - began < 8


def _batch(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(ids)
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def _log_p(teacher: Any, batch: Any) -> torch.Tensor:
    signal = teacher.score(View.of(batch))
    chunks = logits_in_chunks(signal.hidden, signal.head, 1.0)
    return torch.cat([part.scores.float() - part.log_total[:, None] for part in chunks])

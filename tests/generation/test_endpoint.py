"""A teacher behind an OpenAI-compatible endpoint, with everything that goes wrong on the way.

The server here is a real model (`protocol_server.py`), what goes wrong is `proxy.py`; tests/served has real servers.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import protocol_server
import pytest
from datasets import Dataset, load_dataset
from proxy import FaultyProxy
from scripted import scripted
from servers import RunningServer, serving
from warm import warm_process

from llm_distill.cli import main
from llm_distill.generation import Prompt, Sampling, generate, make_filters, prompts_of
from llm_distill.generation.engines.endpoint import BudgetReachedError, EndpointEngine, Prices
from llm_distill.generation.filters import DEFAULTS
from llm_distill.generation.journal import JournalEntries
from llm_distill.generation.run import ACCEPTED, read_report

SCRIPT, KEY = Path(protocol_server.__file__), "sk-not-to-be-shown-anywhere"
SAMPLING = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def server(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, SCRIPT, "PORT", KEY, "20", saved / "teacher"]
    with serving(command, log, headers={"Authorization": f"Bearer {KEY}"}) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def prompts(texts: Dataset) -> list[Prompt]:
    return list(prompts_of({"prompt": text.strip()[:12]} for text in texts["text"][:40]))


def engine_at(url: str, **options: Any) -> EndpointEngine:
    return EndpointEngine(f"{url}/v1", "teacher", SAMPLING, **({"concurrency": 4} | options))


def texts_of(answers: Any) -> dict[str, str]:
    return {answer.prompt.id: answer.completions[0].text for answer in answers}


def test_texts_are_those_of_the_model(server: RunningServer, prompts: list[Prompt], saved: Path) -> None:
    from llm_distill.generation import TransformersEngine
    from llm_distill.models import LanguageModel

    live = TransformersEngine(LanguageModel.load(str(saved / "teacher")), SAMPLING)
    assert texts_of(engine_at(server.url).write(prompts)) == texts_of(live.write(prompts))


def test_conversations_are_asked_as_conversations(server: RunningServer) -> None:
    (chat,) = prompts_of([{"prompt": "import os"}], as_chat=True)
    (text,) = prompts_of([{"prompt": "import os"}])
    engine = engine_at(server.url)
    assert [*texts_of(engine.write([chat])).values()] == [*texts_of(engine.write([text])).values()]


def test_a_server_that_gives_one_completion_is_asked_for_the_others(
    server: RunningServer, prompts: list[Prompt]
) -> None:
    engine = EndpointEngine(f"{server.url}/v1", "teacher", Sampling(num_completions=3, max_new_tokens=2))
    assert [len(answer.completions) for answer in engine.write(prompts[:4])] == [3] * 4


@pytest.mark.parametrize("fault", ["reset", "429", "500", "truncated", "not_json"])
def test_what_fails_for_a_passing_reason_is_repeated(server: RunningServer, prompts: list[Prompt], fault: str) -> None:
    expected = texts_of(engine_at(server.url).write(prompts[:8]))
    with FaultyProxy(server.url, [None, fault, fault, None, fault], retry_after=0.1) as proxy:
        assert texts_of(engine_at(proxy.url).write(prompts[:8])) == expected
        assert proxy.met[fault] == 3
        assert proxy.passed == 8


def test_retry_after_is_honoured(server: RunningServer, prompts: list[Prompt]) -> None:
    with FaultyProxy(server.url, ["429"], retry_after=2.0) as proxy:
        assert len(texts_of(engine_at(proxy.url).write(prompts[:1]))) == 1
        assert proxy.times[1] - proxy.times[0] >= 1.9


def answer_with(*texts: str) -> dict[str, Any]:
    choices = [{"text": text, "message": {"content": text}, "finish_reason": "stop"} for text in texts]
    return {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def test_newer_models_call_the_limit_by_another_name(prompts: list[Prompt]) -> None:
    (chat,) = prompts_of([{"prompt": "import os"}], as_chat=True)
    refusal = (400, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}})
    with scripted([refusal, (200, answer_with("a"))]) as server:
        engine = engine_at(server.url, log_probs=True, concurrency=1)
        assert list(texts_of(engine.write([chat, chat])).values()) == ["a"]
        names = [{"max_tokens", "max_completion_tokens"} & body.keys() for body in server.bodies]
        assert names[0] == {"max_tokens"}
        assert names[-1] == {"max_completion_tokens"}
        assert {body["logprobs"] for body in server.bodies} == {True}


def test_answers_without_choices_are_tried_again_and_counted(prompts: list[Prompt]) -> None:
    """The run ends after the second prompt without an answer: the first may have been the prompt's fault."""
    with scripted([(200, {"choices": []}), (200, answer_with("a")), (200, {})]) as server:
        engine = engine_at(server.url, max_retries=2, concurrency=1)
        written = engine.write(prompts)
        assert next(written).completions[0].text == "a"
        with pytest.raises(ConnectionError, match=r"answered 200 3 times\. .*its answer has no choices"):
            next(written)
        assert len(server.paths) == 2 + 3 + 3


def test_what_is_missing_of_several_completions_is_asked_for(prompts: list[Prompt]) -> None:
    prices = Prices(input=1e6, output=1e6)
    with scripted([(200, answer_with("a", "b")), (200, answer_with("c", "d"))]) as server:
        engine = EndpointEngine(f"{server.url}/v1", "teacher", Sampling(num_completions=3), prices=prices)
        (answer,) = engine.write(prompts[:1])
        assert [completion.text for completion in answer.completions] == ["a", "b", "c"]
        assert [body["n"] for body in server.bodies] == [3, 1]
        assert server.bodies[0]["seed"] != server.bodies[1]["seed"]
        assert answer.cost == 2 * (3 + 4)


@pytest.mark.parametrize("as_chat", [False, True])
def test_log_probabilities_are_those_that_the_endpoint_tells(as_chat: bool) -> None:
    (prompt,) = prompts_of([{"prompt": "import os"}], as_chat=as_chat)
    in_chat = {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}
    answer = answer_with("a")
    answer["choices"][0]["logprobs"] = in_chat if as_chat else {"token_logprobs": [None, -1.0, -2.0]}
    with scripted([(200, answer)]) as server:
        (completion,) = next(engine_at(server.url, log_probs=True).write([prompt])).completions
        assert (completion.mean_log_prob, completion.tokens, completion.finished) == (-1.5, 2, True)


def test_what_reasoning_models_and_callers_of_tools_say_is_kept(prompts: list[Prompt], tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    row = {"tools": [tool], "chat_template_kwargs": {"thinks": True}}
    rows = [{"prompt": f"{prompt.content} {n}", **row} for n, prompt in enumerate(prompts[:3])]
    chats = list(prompts_of(rows, as_chat=True))
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [{"content": "42", "reasoning_content": "6 x 7"}, {"content": "42", "reasoning": "7 x 6"}]
    messages += [{"content": None, "tool_calls": [call]}]
    answers = [(200, answer_with("") | {"choices": [{"message": m, "finish_reason": "stop"}]}) for m in messages]
    with scripted([(404, ""), *answers]) as server:
        generate(engine_at(server.url, concurrency=1), chats, tmp_path / "run", filters=make_filters(DEFAULTS))
        assert all(body["tools"] == [tool] for body in server.bodies[1:])
        assert all(body["chat_template_kwargs"] == {"thinks": True} for body in server.bodies[1:])
    data = load_dataset("parquet", data_files=str(tmp_path / "run" / ACCEPTED))["train"]
    turns = [turn for (turn,) in data["completion"]]
    assert [turn["reasoning_content"] for turn in turns] == ["6 x 7", "7 x 6", None]
    assert turns[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert data["tools"] == [[tool]] * 3


UNUSABLE = {
    "surrogate": (200, answer_with("\ud83d oops"), "half of a character"),
    "parts": (200, {"choices": [{"text": [{"type": "text"}]}]}, "another form than OpenAI's"),
    "no_choice": (200, {"choices": ["text"]}, "another form than OpenAI's"),
    "log_probs": (
        200,
        {"choices": [{"text": "a", "logprobs": {"token_logprobs": [3.0]}}]},
        "log-probabilities are none",
    ),
    "413": (413, "too large", "the endpoint refused it: too large"),
    "422": (422, {"error": {"message": "\ud83d tokens"}}, "the endpoint refused it: ? tokens"),
    "500": (500, "out of memory", "the endpoint answered 500 1 times"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_bad_answer_costs_that_answer_and_is_not_paid_for_again(
    prompts: list[Prompt], tmp_path: Path, kind: str
) -> None:
    status, content, reason = UNUSABLE[kind]
    good, runs = (200, answer_with("a")), []
    with scripted([(404, ""), good, (status, content), good, good, (404, ""), good]) as server:
        for retry in (False, False, True):
            engine = engine_at(server.url, concurrency=1, max_retries=0)
            runs.append(generate(engine, prompts[:4], tmp_path / "run", retry_refused=retry))
            assert len(server.paths) == 5 + 2 * retry
    assert [report.written for report in runs] == [3, 3, 4]
    (told,) = runs[0].unanswered
    assert reason in told
    assert not runs[2].unanswered


def test_what_ends_a_run_comes_after_its_files(prompts: list[Prompt], tmp_path: Path) -> None:
    with (
        scripted([(404, ""), (200, answer_with("a")), (401, "")]) as server,
        pytest.raises(ValueError, match="refuses the key in OPENAI_API_KEY"),
    ):
        generate(engine_at(server.url, concurrency=1), prompts, tmp_path / "run")
    assert read_report(tmp_path / "run").accepted == 1
    assert (tmp_path / "run" / ACCEPTED).is_file()


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": -5, "completion_tokens": -9}, {"prompt_tokens": 0}, "x"], ids=str
)
def test_a_budget_holds_where_no_usage_is_told(
    prompts: list[Prompt], usage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (*_, most) = (len(json.dumps([prompt.content, {}])) + SAMPLING.max_new_tokens for prompt in prompts[:1])
    with scripted([(200, answer_with("a") | {"usage": usage})]) as server:
        engine = engine_at(server.url, prices=Prices(input=1e6, output=1e6, budget=3.5 * most))
        written = engine.write(prompts[:1] * 50)
        with pytest.raises(BudgetReachedError, match=r"the next answer could cost .*max_new_tokens=6"):
            list(written)
        assert len(server.paths) == 3
        assert engine.spent == 3 * most
    assert len([record for record in caplog.records if "how many tokens it has used" in record.message]) == 1


def test_a_password_in_the_address_is_used_and_not_shown(prompts: list[Prompt]) -> None:
    with scripted([(200, answer_with("a"))]) as server:
        engine = EndpointEngine(f"{server.url.replace('//', '//me:hunter2@')}/v1", "teacher", SAMPLING)
        assert next(engine.write(prompts[:1])).completions[0].text == "a"
        assert engine.url == f"{server.url}/v1"
        assert server.headers[0]["Authorization"] == "Basic bWU6aHVudGVyMg=="


def test_an_address_that_the_endpoint_repeats_is_not_in_the_files(prompts: list[Prompt], tmp_path: Path) -> None:
    message = "POST /tenant-hunter2/v1/completions, Basic bWU6aHVudGVyMg== (me:hunter2)"
    with scripted([(404, ""), (200, answer_with("a")), (400, message), (400, f"key sk-{'a1' * 20}")]) as server:
        url = f"{server.url.replace('//', '//me:hunter2@')}/tenant-hunter2/v1"
        engine = EndpointEngine(url, "teacher", SAMPLING, concurrency=1)
        report = generate(engine, prompts[:3], tmp_path / "run")
    assert [*report.unanswered] == [
        f"the endpoint refused it: {said}" for said in ("POST …/completions, … (me:…)", "…")
    ]
    for path in (tmp_path / "run").iterdir():
        for secret in ("hunter2", "bWU6aHVudGVyMg==", "sk-a1"):
            assert secret.encode() not in path.read_bytes(), path.name


def test_an_endpoint_need_not_list_its_models() -> None:
    for answer in ((404, "nothing here"), (200, "not JSON"), (200, {"models": []})):
        with scripted([answer]) as server:
            engine_at(server.url).check()
            assert server.paths == ["/v1/models"]


def test_when_it_gives_up_everything_so_far_is_kept(
    server: RunningServer, prompts: list[Prompt], tmp_path: Path
) -> None:
    with FaultyProxy(server.url, [None] * 5 + ["500"] * 50) as proxy:
        engine = engine_at(proxy.url, max_retries=1, concurrency=1)
        with pytest.raises(ConnectionError, match=r"answered 500 2 times\. What has arrived is kept"):
            generate(engine, prompts, tmp_path / "run")
    assert len(JournalEntries(tmp_path / "run")) == 5
    with FaultyProxy(server.url) as proxy:
        report = generate(engine_at(proxy.url), prompts, tmp_path / "run")
        assert proxy.passed == len(prompts) - 5
    assert report.complete


def test_a_prompt_that_the_endpoint_refuses_does_not_stop_the_others(
    server: RunningServer, prompts: list[Prompt], tmp_path: Path
) -> None:
    long = list(prompts_of([{"prompt": "abc " * 200}]))
    report = generate(engine_at(server.url), [*prompts[:3], *long], tmp_path / "run")
    assert report.written == 3
    (reason,) = report.unanswered
    assert "the endpoint refused it" in reason
    assert "maximum context length" in reason


def test_the_budget_stops_before_it_is_exceeded_and_a_larger_one_goes_on(
    server: RunningServer, prompts: list[Prompt], tmp_path: Path
) -> None:
    def run(budget: float) -> Any:
        prices = Prices(input=1e4, output=1e5, budget=budget)
        spent = JournalEntries(tmp_path / "run").cost
        engine = engine_at(server.url, prices=prices, spent=spent)
        return generate(engine, prompts, tmp_path / "run", filters=make_filters({"length": {}}))

    with pytest.raises(BudgetReachedError, match="with a larger budget the same command goes on"):
        run(8.0)
    report = read_report(tmp_path / "run")
    assert 4.0 < report.cost <= 8.0
    assert 0 < report.accepted < len(prompts)
    assert not report.complete
    written = report.written
    report = run(1000.0)
    assert report.complete
    assert report.written == len(prompts) > written


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"budget": 0.0, "input": 1.0}, "budget=0.0 allows nothing"),
        ({"budget": 1.0}, "a budget needs prices"),
        ({"budget": math.nan, "input": 1.0}, "budget=nan allows nothing"),
        ({"input": -1.0}, "must not be negative"),
        ({"output": math.nan}, "must not be negative"),
    ],
    ids=str,
)
def test_prices_that_cannot_be_are_refused(prices: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prices(**prices)


def run_command(url: str, data: Path, folder: Path, *more: str) -> list[str]:
    options = f"--dataset_name {data} --endpoint_url {url}/v1 --teacher_model_name_or_path teacher --max_new_tokens 6"
    options += " --sampling_temperature 0"
    return ["generate", *options.split(), "--filters", "{}", "--output_dir", str(folder), *more]


@pytest.fixture(scope="module")
def data(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt.content}) for prompt in prompts))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": ""}, "to answer without a key (OPENAI_API_KEY is not set): HTTP 401. Set it in the environment"),
        ({"key": "sk-another-secret"}, "refuses the key in OPENAI_API_KEY: HTTP 401. Set it in the environment"),
        ({"model": "gpt-9"}, "does not serve 'gpt-9', only teacher"),
        ({"url": "http://me:hunter2@127.0.0.1:9"}, "nothing answers at http://127.0.0.1:9/v1"),
        ({"budget": "0"}, "budget=0.0 allows nothing"),
        ({"key": "sk-two\nlines-secret"}, "OPENAI_API_KEY is no key: it has a line break"),
        ({"url": "127.0.0.1:8000"}, "a server's address is like http://host:8000, got '127.0.0.1:8000/v1'"),
        ({"url": "http://127.0.0.1:8000/v1?key=hunter2"}, "has a query (?…) in it"),
    ],
    ids=str,
)
def test_what_cannot_work_is_said_within_seconds_and_without_the_key(
    server: RunningServer,
    data: Path,
    tmp_path: Path,
    change: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", change.get("key", KEY))
    command = run_command(change.get("url", server.url), data, tmp_path / "run")
    command[command.index("teacher")] = change.get("model", "teacher")
    began = time.monotonic()
    with pytest.raises(SystemExit):
        main([*command, *(("--budget", change["budget"]) if "budget" in change else ())])
    assert time.monotonic() - began < 15
    output = "".join(capsys.readouterr())
    assert message in output
    for secret in (KEY, "sk-another-secret", "lines-secret", "hunter2"):
        assert secret not in output


def test_killed_runs_pay_for_no_prompt_that_has_arrived(
    server: RunningServer, data: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with FaultyProxy(server.url, ["slow"] * 1000, slow_seconds=0.02) as proxy:
        for _ in range(3):
            command = run_command(proxy.url, data, folder, "--concurrency", "2")
            program, before = warm_process().start("-m", "llm_distill.cli", *command), len(proxy.times)
            while len(proxy.times) < before + 6 and program.poll() is None:
                time.sleep(0.01)
            program.kill()
        report = generate(engine_at(proxy.url), prompts, folder)
        assert report.complete
        assert report.written == len(prompts)
        in_flight_at_most = 3 * 2
        assert len(proxy.times) <= len(prompts) + in_flight_at_most
    for path in folder.iterdir():
        assert KEY.encode() not in path.read_bytes()

"""What counts as a prompt, and how a conversation becomes tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama
from transformers import AutoTokenizer
from writing import GREEDY

from llm_distill.generation import TransformersEngine, prompts_of
from llm_distill.models import LanguageModel

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_conversations_go_through_the_chat_template(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved / "teacher")
    chat = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "gold answer"}]
    (prompt,) = prompts_of([{"messages": chat}], system_prompt="be brief")
    assert [message["role"] for message in prompt.content] == ["system", "user"]
    engine = TransformersEngine(LanguageModel(tiny_llama(2), tokenizer), GREEDY)
    with pytest.raises(ValueError, match="no chat template: it is a base model"):
        list(engine.write([prompt]))
    tokenizer.chat_template = TEMPLATE
    (answer,) = engine.write([prompt])
    assert tokenizer.decode(answer.prompt_ids) == "<system>be brief<user>def f<assistant>"


def test_a_conversation_has_no_second_system_turn() -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "def f"}]
    chat[1]["tool_calls"] = None
    for role in ("system", "developer"):
        chat[0]["role"] = role
        (prompt,) = prompts_of([{"messages": chat}], system_prompt="be brief")
        assert prompt.content == [chat[0], {"role": "user", "content": "def f"}]


def test_a_prompt_is_known_by_all_that_is_sent() -> None:
    ask, tool = [{"role": "user", "content": "Is it warm?"}], {"type": "function", "function": {"name": "weather"}}
    rows = [{}, {"tools": [tool]}, {"tools": json.dumps([tool])}, {"chat_template_kwargs": {"thinks": False}}]
    rows += [{"tools": [], "chat_template_kwargs": {"thinks": None}}]
    prompts = list(prompts_of({"messages": ask, **row} for row in rows))
    options = [prompt.options for prompt in prompts]
    assert options == [{}, {"tools": [tool]}, {"chat_template_kwargs": {"thinks": False}}]
    (text,) = prompts_of([{"prompt": "Is it warm?", "tools": ["hammer", "saw"]}])
    assert text.options == {}
    with pytest.raises(ValueError, match="row 0 cannot be sent to a teacher: its `tools` must be a list of JSON schem"):
        list(prompts_of([{"messages": ask, "tools": ["hammer", "saw"]}]))


def test_tools_and_template_options_reach_the_template(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved / "teacher")
    tokenizer.chat_template = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{{ mood }}" + TEMPLATE
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"messages": [{"role": "user", "content": "warm?"}], "tools": tools, "chat_template_kwargs": {"mood": "gay"}}
    engine = TransformersEngine(LanguageModel(tiny_llama(2), tokenizer), GREEDY)
    (answer,) = engine.write(list(prompts_of([row])))
    assert tokenizer.decode(answer.prompt_ids) == "[weather]gay<user>warm?<assistant>"


def test_a_conversation_that_the_template_refuses_costs_that_conversation(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved / "teacher")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    ask = [{"role": "user", "content": "warm?"}]
    prompts = list(prompts_of([{"messages": [{"role": "system", "content": "x"}, *ask]}, {"messages": ask}]))
    answers = TransformersEngine(LanguageModel(tiny_llama(2), tokenizer), GREEDY).write(prompts)
    assert [answer.refused for answer in answers] == ["the chat template refuses this conversation: no system", None]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, "whole texts and no prompts: --prompt_tokens 32"),
        ([{"a": "b"}], {}, "no column .* only a"),
        ([{"prompt": 3}], {}, "row 0 has no prompt in 'prompt'"),
        ([{"prompt": "  "}], {}, "row 0 has no prompt"),
        ([{"prompt": "a"}, {"text": "b"}], {}, "row 1 has no prompt"),
        ([{"messages": [{"role": "system", "content": "x"}]}], {}, "in which no user asks"),
        ([{"messages": [{"role": "user", "content": " "}]}], {}, "row 0 of 'messages' .* in which no user asks"),
        ([{"prompt": "a"}, {"prompt": "\ud83d"}], {}, "row 1 cannot be sent to a teacher: .*surrogates"),
        ([{"prompt": "a"}], {"column": "b"}, "no column 'b'"),
    ],
    ids=str,
)
def test_data_without_prompts_is_refused(rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(prompts_of(rows, **options))

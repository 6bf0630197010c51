"""What counts as a prompt, and how a conversation becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama
from transformers import AutoTokenizer
from writing import GREEDY

from llm_distill.generation import TransformersEngine, prompts_of
from llm_distill.generation.prompts import prompt_ids
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
    (prompt,) = prompts_of([{"messages": chat}], system_prompt="be brief")
    assert prompt.content == chat


def test_what_a_chat_template_refuses_is_said_with_the_prompt(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved / "teacher")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"the prompt .*def f.*System role not supported"):
        prompt_ids([{"role": "user", "content": "def f"}], tokenizer)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, "whole texts and no prompts: --prompt_tokens 32"),
        ([{"a": "b"}], {}, "no column .* only a"),
        ([{"prompt": 3}], {}, "row 0 has no prompt in 'prompt'"),
        ([{"prompt": "  "}], {}, "row 0 has no prompt"),
        ([{"messages": [{"role": "system", "content": "x"}]}], {}, "in which no user asks"),
        ([{"prompt": "a"}], {"column": "b"}, "no column 'b'"),
    ],
    ids=str,
)
def test_data_without_prompts_is_refused(rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(prompts_of(rows, **options))

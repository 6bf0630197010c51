"""A dataset of each kind that a trainer takes."""

from __future__ import annotations

from datasets import Dataset

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}U:{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
QUESTIONS = [(f"x = {i}", f"return {i} + 1") for i in range(8)]
DATA = {
    "text": Dataset.from_dict({"text": [f"def f(): {a}; {b}" for a, b in QUESTIONS]}),
    "prompt and completion": Dataset.from_dict(
        {"prompt": [a for a, _ in QUESTIONS], "completion": [b for _, b in QUESTIONS]}
    ),
    "chat": Dataset.from_dict(
        {"messages": [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in QUESTIONS]}
    ),
}

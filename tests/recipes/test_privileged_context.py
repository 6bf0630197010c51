"""The recipe of retrieval: what is most like a prompt stands before it, for the teacher alone."""

from __future__ import annotations

from datasets import Dataset
from privileged_context import add_passages

LIBRARY = Dataset.from_dict({"text": ["Miloka lies on the river Lodova.", "Renvado makes oak clocks.", "It rains."]})


def test_the_passage_that_is_most_like_a_prompt_is_put_before_it() -> None:
    rows = [{"prompt": "Which river is Miloka on?"}, {"prompt": "What does Renvado make?"}]
    found = add_passages(Dataset.from_list(rows), LIBRARY, passages=1)
    assert found["teacher_prompt"][:] == [
        "Miloka lies on the river Lodova.\n\nWhich river is Miloka on?",
        "Renvado makes oak clocks.\n\nWhat does Renvado make?",
    ]


def test_in_a_conversation_it_is_put_into_the_last_turn() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is Miloka?"}]
    (read,) = add_passages(Dataset.from_list([{"prompt": turns}]), LIBRARY, passages=2)["teacher_prompt"]
    assert read[0] == turns[0]
    first, second, asked = read[1]["content"].split("\n\n")
    assert first == LIBRARY["text"][0]
    assert second in LIBRARY["text"][1:]
    assert asked == "Where is Miloka?"

"""Rows that cannot be learned from are refused with their number before TRL sees them; odd ones that can are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from kinds_of_data import CHAT_TEMPLATE, DATA
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.prepare import PreparedData, prepare
from llm_distill.data.validate import RowChecks
from llm_distill.rows import IGNORED, count_rows

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
IDS = list(range(1, 9))
TOKENS = {"input_ids": IDS, "labels": IDS}
ASKED, SYSTEM = {"role": "user", "content": "x?"}, {"role": "system", "content": "Be brief."}
ANSWERED = {"role": "assistant", "content": "y"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.fixture
def chats(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = NO_SYSTEM + CHAT_TEMPLATE
    return tokenizer


Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepared(config: Callable[..., DistillationConfig], chats: PreTrainedTokenizerBase) -> Prepare:
    def prepared(rows: Any, **options: Any) -> PreparedData:
        data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return prepare(chats, config(**options), data)

    return prepared


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "output": "b"}, ("instruction, output", "`messages`", "dataset_text_field")),
        ({"question": "a", "answer": "b"}, ("question, answer", "rename_columns")),
        ({"content": "a"}, ("content", "dataset_text_field")),
        ({"prompt": "a"}, ("prompts without a `completion`", "llm-distill generate")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("prompt, chosen, rejected", "without a `completion`")),
        ({"text": "a b", "labels": [3, 7]}, ("`labels`", "no `input_ids`")),
        ({"text": "a b", "labels": 1}, ("`labels`", "no `input_ids`")),
        ({"messages": [ASKED, ANSWERED], "assistant_masks": [1, 1]}, ("`assistant_masks`",)),
    ],
)
def test_columns_that_are_there_and_that_are_expected_are_named(
    prepared: Prepare, row: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="train dataset") as caught:
        prepared([row] * 3)
    assert all(word in str(caught.value) for word in words)


GOOD = {"text": {"text": "x"}, "pair": {"prompt": "a", "completion": "b"}, "chat": {"messages": [ASKED, ANSWERED]}}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        (GOOD["text"], {"text": None}, "`text` is None"),
        (GOOD["pair"], {"prompt": "a", "completion": None}, "`completion` is None"),
        (GOOD["pair"], {"prompt": None, "completion": "b"}, "`prompt` is None"),
        (GOOD["chat"], {"messages": None}, "`messages` is None"),
        (GOOD["chat"], {"messages": []}, "empty conversation"),
        (GOOD["chat"], {"messages": [ASKED, {"role": "assistant", "content": None}]}, "`content` of message 1"),
        (GOOD["chat"], {"messages": [{"role": None, "content": "x"}]}, "message 0 of `messages` has no `role`"),
        (GOOD["chat"], {"messages": [SYSTEM, ASKED, ANSWERED]}, "System role not supported"),
        (TOKENS, {"input_ids": IDS, "labels": IDS[:4]}, "`labels` has 4 numbers and `input_ids` 8"),
        (TOKENS, {"input_ids": IDS, "labels": [*IDS[1:], 9]}, "unshifted"),
        (TOKENS, {"input_ids": IDS, "labels": [IGNORED] * 3 + IDS[4:] + [9]}, "has 5 at position 3"),
        (TOKENS, {"input_ids": [*IDS[1:], 99_999], "labels": [IGNORED] * 8}, "99999.*vocabulary ends at 319"),
        (TOKENS, {"input_ids": [-1, *IDS[1:]], "labels": [IGNORED] * 8}, "`input_ids` has -1"),
        (TOKENS, {"input_ids": None, "labels": IDS}, "`input_ids` is not a list"),
        (
            {"input_ids": IDS, "attention_mask": [1] * 8},
            {"input_ids": IDS, "attention_mask": [1] * 4 + [2] * 4},
            "`attention_mask` has other numbers than 0 and 1",
        ),
        (
            {"input_ids": IDS, "completion_mask": [1] * 8},
            {"input_ids": IDS, "completion_mask": [1] * 4},
            "`completion_mask` has 4 numbers",
        ),
        (
            {"input_ids": IDS, "position_ids": list(range(8))},
            {"input_ids": IDS, "position_ids": [0, 1, 2, 0, 1, 2, 3, 4]},
            "packed already .`position_ids` begin again",
        ),
        ({"input_ids": IDS, "seq_lengths": [3, 5]}, {"input_ids": IDS, "seq_lengths": [3, 4]}, "packed already"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(
    prepared: Prepare, good: dict[str, Any], bad: dict[str, Any], words: str, is_stream: bool
) -> None:
    rows = [good] * 5 + [bad] + [good] * 2
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if is_stream else data
    with pytest.raises(ValueError, match=f"train dataset, row {0 if 'seq_lengths' in bad else 5}.*{words}"):
        list(prepared(data).train)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_row_whose_mask_hides_all_is_refused_where_nothing_leaves_it_out(prepared: Prepare, is_stream: bool) -> None:
    data = Dataset.from_list([{"input_ids": IDS, "attention_mask": [seen] * 8} for seen in (1, 0, 1)])
    with pytest.raises(ValueError, match="train dataset, row 1: it has no tokens"):
        list(prepared(data.to_iterable_dataset() if is_stream else data, max_length=None).train)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 12}, "`text` is 12, not a text"),
        ({"text": ["a", "b"]}, "`text` is ['a', 'b'], not a text"),
        ({"messages": "[{}]"}, "not a list of messages"),
        ({"messages": ASKED}, "not a list of messages"),
        ({"messages": ["a", "b"]}, "not a list of messages"),
        ({"messages": [{"from": "human", "value": "a"}]}, "has no `role`"),
        ({"conversations": [ASKED, ANSWERED]}, "has no `from`"),
        ({"messages": [{"role": "user", "content": 5}]}, "is 5, not a text"),
        ({"prompt": [ASKED], "completion": "y"}, "`completion` is 'y', not a list of messages"),
        ({"input_ids": [1.0, 2.0]}, "not a list of whole numbers"),
        ({"input_ids": [[1, 2], [3]]}, "not a list of whole numbers"),
        ({"input_ids": [[1, 2], [3, 4]]}, "not a list of whole numbers"),
        ({"input_ids": "1 2 3"}, "not a list of whole numbers"),
        ({"input_ids": [1, None, 3]}, "not a list of whole numbers"),
        ({"messages": [ASKED, ANSWERED], "tools": "{"}, "`tools` is '{', which is not JSON"),
        ({"messages": [ASKED, ANSWERED], "chat_template_kwargs": None}, "`chat_template_kwargs` is None"),
    ],
)
def test_values_of_another_type_are_refused(prepared: Prepare, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="train dataset, row 0") as caught:
        prepared([row] * 3)
    assert words in str(caught.value)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_formatting_function_makes_texts_whatever_the_columns_are_called(
    config: Callable[..., DistillationConfig], chats: PreTrainedTokenizerBase, is_stream: bool
) -> None:
    data = Dataset.from_list([{"prompt": "a", "response": "b"}] * 3)
    data = data.to_iterable_dataset() if is_stream else data
    expected = Dataset.from_list([{"text": "a: b"}] * 3)
    texts = RowChecks(chats, config(), lambda row: f"{row['prompt']}: {row['response']}").check(data, "train")
    assert list(texts) == list(expected)
    with pytest.raises(ValueError, match=r"row 0: formatting_func makes \['a'\] of it, not a text"):
        list(RowChecks(chats, config(), lambda row: [row["prompt"]]).check(data, "train"))
    with pytest.raises(ValueError, match="completion_only_loss"):
        RowChecks(chats, config(), str).check(DATA["prompt and completion"], "train")


def test_what_is_no_dataset_is_refused(prepared: Prepare) -> None:
    with pytest.raises(ValueError, match="a stream, got str"):
        prepared("data.jsonl")
    with pytest.raises(ValueError, match="splits"):
        prepared({"train": DATA["text"], "test": DATA["text"]})
    for empty in (DATA["text"].select([]), IterableDataset.from_generator(lambda: iter([]))):
        with pytest.raises(ValueError, match="has no rows"):
            prepared(empty)
    with pytest.raises(ValueError, match="has no rows with columns"):
        prepared(IterableDataset.from_generator(lambda: iter([1, 2])))
    with pytest.raises(ValueError, match="prompts without a `completion`"):
        prepared([{"prompt": "a"}] * 3, dataset_text_field="prompt")


def test_a_tokenizer_without_a_template_or_an_end_is_refused(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"no chat template.*chat_template_path"):
        prepare(tokenizer, config(), DATA["chat"])
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        prepare(endless, config(), DATA["text"])


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([{"prompt": "a", "text": "b c"}] * 3, id="prompt and text"),
        pytest.param([{"prompt": "a", "prompt_id": "1", "messages": [ASKED, ANSWERED]}] * 3, id="ultrachat"),
        pytest.param([GOOD["chat"] | {"chosen": "a", "rejected": "b"}] * 3, id="messages and preferences"),
        pytest.param([{"text": "a b", "label": 1, "text_label": "x"}] * 3, id="extra columns"),
        pytest.param([{"text": ""}, {"text": "a b"}, {"text": "a<|endoftext|>b"}], id="empty, and an end inside"),
        pytest.param([{"prompt": "", "completion": "b"}, {"prompt": "a", "completion": ""}], id="empty halves"),
        pytest.param(
            [{"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": CALL}, ANSWERED]}] * 3,
            id="tool calls",
        ),
        pytest.param([{"prompt": [ASKED], "completion": [ANSWERED]}] * 3, id="conversational pairs"),
        pytest.param([{"conversations": [{"from": "user", "value": "a"}]}] * 3, id="from and value"),
        pytest.param([{"input_ids": IDS, "labels": [IGNORED] * 4 + IDS[4:], "text": "a"}] * 3, id="masked labels"),
        pytest.param([TOKENS, {"input_ids": IDS, "labels": [IGNORED] * 8}], id="a row in which nothing counts"),
        pytest.param([{"input_ids": IDS, "completion_mask": [0] * 4 + [1] * 4}] * 3, id="completion mask"),
        pytest.param([{"input_ids": IDS, "labels": [0, *IDS[1:]]}] * 3, id="another first label"),
        pytest.param(
            [{"input_ids": [0, 0, *IDS], "attention_mask": [0, 0] + [1] * 8, "position_ids": [0, 0, *range(8)]}],
            id="positions of a padded row",
        ),
        pytest.param(
            [{"input_ids": [-1, -1, *IDS], "attention_mask": [0] * 2 + [1] * 8, "labels": [5, 5, *IDS]}] * 3,
            id="ids and labels that are masked",
        ),
        pytest.param(
            [{"input_ids": IDS, "attention_mask": [seen] * 8, "labels": IDS} for seen in (0, 1)],
            id="a row that is masked",
        ),
        pytest.param([{"input_ids": [], "labels": []}, TOKENS], id="a row without tokens"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_odd_and_can_be_learned_from_is(prepared: Prepare, rows: list[Any], is_stream: bool) -> None:
    data = Dataset.from_list(rows)
    train = list(prepared(data.to_iterable_dataset() if is_stream else data).train)
    assert train
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in train)


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas"])
@pytest.mark.parametrize("row", [GOOD["text"], GOOD["chat"], TOKENS])
def test_a_datasets_form_makes_no_difference(prepared: Prepare, row: dict[str, Any], form: str) -> None:
    data = Dataset.from_list([row] * 3)
    assert prepared(data.with_format(form)).train.to_dict() == prepared(data).train.to_dict()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_masked_tokens_neither_count_nor_are_seen(prepared: Prepare, side: str, is_stream: bool) -> None:
    padding, mask = [0] * 4, [0] * 4
    rows = [
        {"input_ids": padding + IDS, "attention_mask": mask + [1] * 8}
        if side == "left"
        else {"input_ids": IDS + padding, "attention_mask": [1] * 8 + mask}
    ] * 3
    data = Dataset.from_list(rows)
    data = prepared(data.to_iterable_dataset() if is_stream else data)
    batch = data.collate(list(data.train))
    assert batch["input_ids"].tolist() == [IDS] * 3
    assert int(count_rows(batch["labels"])) == 3 * 7


def test_a_trainer_refuses_rows_before_it_loads_the_teacher_and_in_an_evaluation(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    def trainer(**data: Any) -> DistillationTrainer:
        teacher = LiveTeacher(tiny_llama(2), tokenizer) if "teacher" not in data else data.pop("teacher")
        return DistillationTrainer(tiny_llama(1), teacher, config(), processing_class=tokenizer, **data)

    bad = Dataset.from_list([{"text": "x"}, {"text": None}])
    with pytest.raises(ValueError, match="train dataset, row 1"):
        trainer(train_dataset=bad, teacher="nowhere")
    with pytest.raises(ValueError, match="mail dataset, row 1"):
        trainer(train_dataset=DATA["text"], eval_dataset={"mail": bad})
    with pytest.raises(ValueError, match="eval dataset, row 1"):
        trainer(train_dataset=DATA["text"]).evaluate(bad)


def test_a_stream_is_refused_at_its_bad_row_and_can_be_gone_on_with(prepared: Prepare) -> None:
    rows = [{"text": f"x = {n}"} for n in range(6)]
    whole = list(prepared(Dataset.from_list(rows).to_iterable_dataset()).train)
    stream = prepared(Dataset.from_list(rows).to_iterable_dataset(num_shards=2)).train
    iterator = iter(stream)
    seen = [next(iterator) for _ in range(4)]
    again = prepared(Dataset.from_list(rows).to_iterable_dataset(num_shards=2)).train
    again.load_state_dict(stream.state_dict())
    assert seen + list(again) == whole

    def endless() -> Any:
        yield from [*rows, {"text": None}]

    iterator = iter(prepared(IterableDataset.from_generator(endless)).train)
    assert len([next(iterator) for _ in range(6)]) == 6
    with pytest.raises(ValueError, match="row 6: `text` is None"):
        next(iterator)


@pytest.mark.parametrize("row", [TOKENS, GOOD["text"], GOOD["pair"], GOOD["chat"]])
def test_sound_rows_are_looked_at_together(
    config: Callable[..., DistillationConfig],
    chats: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, Any],
) -> None:
    monkeypatch.setattr(RowChecks, "_check_row", lambda *_: pytest.fail("one by one takes minutes"))
    RowChecks(chats, config()).check(Dataset.from_list([row] * 100), "train")

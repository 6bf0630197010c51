"""On-policy: what the student writes is what is learned from, the same however it is batched, spread or resumed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from kinds_of_data import CHAT_TEMPLATE, DATA
from runs import copied_state
from tiny import VOCAB, make_config, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.data.completions import print_completions
from llm_distill.data.on_policy import OnPolicy
from llm_distill.data.on_policy_rows import prompt_of, rows_of
from llm_distill.data.policy import Policy
from llm_distill.generation.filters import repeated_share
from llm_distill.rows import IGNORED, WRITTEN
from llm_distill.tables import Table

GREEDY = {"on_policy_share": 1.0, "max_completion_length": 5, "sampling_temperature": 0.0}
NOT_WRITTEN = {"max_completion_length": 256, "sampling_temperature": 1.0}
"""The defaults of options that have no effect where nothing is written."""
PROMPTS = [list(range(5, 5 + length)) for length in (3, 9, 4, 7, 11, 5, 8, 6)]


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DistillationTrainer]:
    """A trainer of two tiny Llamas on prompts with completions of two tokens."""
    rows = [{"input_ids": [*prompt, 3, 4], "labels": [IGNORED] * len(prompt) + [3, 4]} for prompt in PROMPTS]

    def build_trainer(
        data: Any = None, student: Any = None, teacher: Any = None, **options: Any
    ) -> DistillationTrainer:
        plain = {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "learning_rate": 1.0}
        return DistillationTrainer(
            model=student or tiny_llama(1, hidden=16).double(),
            teacher=teacher or LiveTeacher(tiny_llama(2).double(), tokenizer),
            args=make_config(tmp_path / "out", **(plain | GREEDY | options)),
            train_dataset=data or Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return build_trainer


ENDS = (0, 2)
"""The tokenizer's end of text, and that of the tiny Llamas' generation_config."""


def written_alone(student: PreTrainedModel, prompt: list[int], penalty: float = 1.0) -> list[int]:
    """The likeliest five tokens after a prompt, each from a forward without padding, batch or cache."""
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            logits = student(torch.tensor([ids]), use_cache=False).logits[0, -1]
        for token in {*ids}:
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        ids.append(int(logits.argmax()))
        if ids[-1] in ENDS:
            break
    return ids[len(prompt) :]


def completions_of(student: PreTrainedModel) -> list[list[int]]:
    return [written_alone(student, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4), (3, 2)])
def test_the_step_is_that_on_what_the_student_writes_alone(
    build: Callable[..., DistillationTrainer], size: int, accumulation: int
) -> None:
    batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    on_policy = build(**batches)
    completions = completions_of(on_policy.model)
    by_hand = [
        {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + ids}
        for prompt, ids in zip(PROMPTS, completions, strict=True)
    ]
    off_policy = build(Dataset.from_list(by_hand), on_policy_share=0.0, **batches | NOT_WRITTEN)
    on_policy.train()
    off_policy.train()
    expected = copied_state(off_policy.model)
    for name, weight in copied_state(on_policy.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)
    log = on_policy.state.log_history[0]
    seen = completions[: size * accumulation]
    assert log["completion_length"] == pytest.approx(sum(map(len, seen)) / len(seen))
    assert log["completion_cut_share"] == pytest.approx(sum(ids[-1] not in ENDS for ids in seen) / len(seen))
    texts = [on_policy.processing_class.decode(ids, skip_special_tokens=True) for ids in seen]
    assert log["completion_repeated_share"] == pytest.approx(sum(map(repeated_share, texts)) / len(seen))
    assert log["reverse_kl"] > 0
    assert 0 < log["top_k_mass"] < 1
    assert 0 <= log["top_k_overlap"] < 1
    assert log["writing_seconds"] > 0


def test_the_students_own_text_has_its_own_divergence_and_is_not_imitated(
    build: Callable[..., DistillationTrainer],
) -> None:
    by_origin = {"on_policy_share": 0.5, "divergence": "skew_kl", "on_policy_divergence": "skew_reverse_kl"}
    states = {}
    for size, accumulation, decay in ((8, 1, 3.0), (2, 4, 3.0), (4, 2, 0.0)):
        trainer = build(
            **by_origin,
            ce_weight=0.5,
            early_token_decay=decay,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        batch = next(iter(build(per_device_train_batch_size=8).get_train_dataloader()))
        (mixed,) = trainer.policy(iter([[batch]]), 0)
        trainer.train()
        states[size] = copied_state(trainer.model)

    # The same with losses written out over logits.
    student, teacher = tiny_llama(1, hidden=16).double(), tiny_llama(2).double()
    inputs, labels = {name: mixed[name] for name in ("input_ids", "attention_mask")}, mixed["labels"][:, 1:]
    q, p = (model(**inputs).logits[:, :-1].softmax(-1) for model in (student, teacher))
    near_q, near_p = 0.1 * p + 0.9 * q, 0.9 * p + 0.1 * q
    skew_kl, skew_reverse_kl = (p * (p / near_q).log()).sum(-1), (q * (q / near_p).log()).sum(-1)
    ce = -q.gather(-1, labels.clamp(min=0)[..., None])[..., 0].log()
    own = mixed[WRITTEN][:, None]
    assert 0 < own.sum() < 8
    losses, counts = torch.where(own, skew_reverse_kl, skew_kl + 0.5 * ce), labels != IGNORED
    weights = torch.ones_like(losses)
    for row in own[:, 0].nonzero()[:, 0]:
        weights[row, counts[row]] = torch.exp(-torch.arange(int(counts[row].sum())) / 3).double()
    parameters = dict(student.named_parameters())
    for sizes, weight in (((8, 2), weights), ((4,), torch.ones_like(losses))):
        loss = (weight * losses)[counts].sum() / weight[counts].sum()
        gradients = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
        for size, (name, value), gradient in (
            (size, *pair) for size in sizes for pair in zip(parameters.items(), gradients, strict=True)
        ):
            torch.testing.assert_close(states[size][name], value - gradient, rtol=1e-6, atol=1e-8)


def test_without_a_share_the_trainer_is_the_one_without_a_policy(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(on_policy_share=0.0, **NOT_WRITTEN)
    assert type(trainer.policy) is Policy, "tests/equivalence/golden.json has what that comes to, bit for bit"
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.policy(iter([[batch]]), 0) == [batch]


def test_a_mixture_draws_rows_by_step_and_leaves_the_others(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(on_policy_share=0.5, per_device_train_batch_size=8)
    batch = next(iter(trainer.get_train_dataloader()))
    changed = []
    for step in range(40):
        (mixed,) = trainer.policy(iter([[batch]]), step)
        rows = {tuple(prompt_of(row)): row["input_ids"] for row in rows_of(mixed)}
        assert {*rows} == {tuple(prompt) for prompt in PROMPTS}
        changed.append([rows[tuple(prompt)] != [*prompt, 3, 4] for prompt in PROMPTS])
    assert 0.4 < sum(map(sum, changed)) / 320 < 0.6
    assert len({tuple(row) for row in changed}) > 20, "other rows in other steps"


def batches_of(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    """What one epoch of data gives to a policy."""
    return list(trainer.get_train_dataloader())


def prompts_and_texts(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(prompt_of(row)), tuple(row["input_ids"])) for row in rows_of(batch)]


def test_several_texts_follow_a_prompt_in_its_micro_batch(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(num_generations=4, per_device_train_batch_size=8, sampling_temperature=1.0, num_train_epochs=1)
    batches = batches_of(trainer)
    assert len(batches) == 4, "eight prompts, two in each"
    for step, batch in enumerate(batches):
        (written,) = trainer.policy(iter([[batch]]), step)
        rows = prompts_and_texts(written)
        assert len(rows) == len({*rows}) == 8, "no text twice"
        expected = sorted(tuple(prompt) for prompt in PROMPTS[2 * step : 2 * step + 2] for _ in range(4))
        assert sorted(prompt for prompt, _ in rows) == expected
    trainer.args.max_steps = -1
    trainer.train()
    assert trainer.state.global_step == 4


def test_of_a_mixture_each_text_after_a_prompt_is_drawn_apart(build: Callable[..., DistillationTrainer]) -> None:
    options = {"num_generations": 4, "per_device_train_batch_size": 32, "sampling_temperature": 1.0}
    trainer = build(on_policy_share=0.5, **options)
    (batch,) = batches_of(trainer)
    (mixed,) = trainer.policy(iter([[batch]]), 0)
    from_data = [text == (*prompt, 3, 4) for prompt, text in prompts_and_texts(mixed)]
    assert len(from_data) == 32
    assert 8 < sum(from_data) < 24


def test_texts_of_several_steps_are_written_by_the_student_of_the_first(
    build: Callable[..., DistillationTrainer],
) -> None:
    trainer = build(steps_per_generation=2, per_device_train_batch_size=2)
    coming = iter([[batch] for batch in batches_of(trainer)])
    before = completions_of(trainer.model)
    first = trainer.policy(coming, 0)
    trainer.model.load_state_dict(tiny_llama(3, hidden=16).state_dict())
    after = completions_of(trainer.model)
    steps = [first, *(trainer.policy(coming, step) for step in (1, 2, 3))]
    for step, (batch,) in enumerate(steps):
        texts = before if step < 2 else after
        expected = {tuple(PROMPTS[place] + texts[place]) for place in range(2 * step, 2 * step + 2)}
        assert {text for _, text in prompts_and_texts(batch)} == expected, step
    assert trainer.policy(coming, 4) == []


def test_texts_for_steps_to_come_are_kept_with_a_checkpoint_of_as_many_ranks(
    build: Callable[..., DistillationTrainer], tmp_path: Path
) -> None:
    options = {"steps_per_generation": 3, "per_device_train_batch_size": 2, "sampling_temperature": 1.0}
    trainer, resumed = build(**options), build(**options)
    coming, left = (iter([[batch] for batch in batches_of(trainer)]) for _ in range(2))
    trainer.policy(coming, 0)
    trainer.policy.save(tmp_path)
    next(left)  # as a resumed trainer skips what it has learned from
    resumed.policy.load(tmp_path)
    for step in (1, 2, 3):
        (expected,), (batch,) = trainer.policy(coming, step), resumed.policy(left, step)
        assert prompts_and_texts(batch) == prompts_and_texts(expected)
    (tmp_path / "written-0-of-1.json").rename(tmp_path / "written-0-of-2.json")
    with pytest.raises(ValueError, match="another number of ranks than 1"):
        resumed.policy.load(tmp_path)


def replaying(trainer: DistillationTrainer, steps: range) -> list[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Prompts and texts of each step of a policy, which is first tried as `check` does."""
    (batch,) = batches_of(trainer)
    trainer.policy(iter([[batch]]), steps.start)
    return [prompts_and_texts(trainer.policy(iter([[batch]]), step)[0]) for step in steps]


REPLAY = {"replay_share": 0.5, "sampling_temperature": 1.0, "per_device_train_batch_size": 8}


def test_replay_draws_from_what_was_learned_before_and_from_nothing_else(
    build: Callable[..., DistillationTrainer],
) -> None:
    trainer = build(**REPLAY)
    steps = replaying(trainer, range(30))
    learned, replayed = {*steps[0]}, 0
    for rows in steps[1:]:
        old = [row for row in rows if row in learned]
        assert len(old) == len({*old}), "none twice in a step"
        replayed += len(old)
        learned |= {*rows}
    assert 0.4 < replayed / (29 * 8) < 0.6
    log = trainer.policy.log()
    assert 0 < log["completion_age"] < 15
    assert "completion_age" not in trainer.policy.log(), "since the last log"
    assert steps == replaying(build(**REPLAY), range(30)), "the same run"
    few = build(**REPLAY, replay_size=3)
    replaying(few, range(10))
    assert len(few.policy.replay) == 3


def test_a_resumed_run_replays_what_it_would_have(build: Callable[..., DistillationTrainer], tmp_path: Path) -> None:
    whole = replaying(build(**REPLAY), range(12))
    killed, resumed = build(**REPLAY), build(**REPLAY)
    replaying(killed, range(6))
    killed.policy.save(tmp_path)
    resumed.policy.load(tmp_path)
    assert replaying(resumed, range(6, 12)) == whole[6:]


def test_what_is_replayed_is_scored_by_the_student_of_the_moment(build: Callable[..., DistillationTrainer]) -> None:
    """Its steps are those on the same texts as if a dataset had them."""
    plain = {"max_steps": 4, "per_device_train_batch_size": 8}
    trainer, learned = build(**plain, replay_share=0.9), []

    class Recorded(OnPolicy):
        def __call__(self, *args: Any) -> list[dict[str, Any]]:
            batches = super().__call__(*args)
            learned.extend(row for batch in batches for row in rows_of(batch))
            return batches

    trainer.policy.__class__ = Recorded
    trainer.train()
    assert trainer.state.log_history[-2]["completion_age"] > 1, "most is not new"
    by_hand = build(Dataset.from_list(learned), on_policy_share=0.0, **plain | NOT_WRITTEN)
    by_hand.train()
    expected = copied_state(by_hand.model)
    for name, weight in copied_state(trainer.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)


def test_texts_of_a_logged_step_are_shown_with_what_the_teacher_says_of_them(
    build: Callable[..., DistillationTrainer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(
        log_completions=True,
        num_completions_to_print=3,
        max_steps=2,
        logging_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-9,
    )
    tables, sent = [], []
    trackio = types.ModuleType("trackio")
    trackio.Table, trackio.log = (lambda dataframe: dataframe), sent.append
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    trainer.completions.trackers = ["trackio"]
    monkeypatch.setattr(trainer, "_show_completions", lambda *shown: tables.append(shown) or print_completions(*shown))
    trainer.train()
    ((step, table),) = tables
    assert (step, len(table.rows)) == (2, 2), "every other text of four"
    decode, teacher, texts = trainer.processing_class.decode, tiny_llama(2).double(), {}
    for prompt, ids in zip(PROMPTS[4:], completions_of(trainer.model)[4:], strict=True):
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (teacher, trainer.model)
            )
        kd = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        own = log_p.gather(-1, torch.tensor(ids)[:, None]).mean()
        cut = "no" if ids[-1] in ENDS else "yes"
        texts[decode(prompt)] = [decode(prompt), decode(ids), f"{own:.3f}", f"{kd:.3f}", cut]
    assert list(table.header) == ["Prompt", "Completion", "Teacher's log p", "kd", "Cut"]
    for row in table.rows:
        assert row == texts[row[0]]
    (logged,) = sent
    assert {*logged["completions"]["prompt"]} == {*texts}
    assert "Step 2" in capsys.readouterr().out
    monkeypatch.setattr("llm_distill.data.completions.is_rich_available", lambda: False)
    print_completions(2, table)
    assert table.markdown() in capsys.readouterr().out


def test_in_jupyter_texts_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = pytest.importorskip("llm_distill.notebook")
    shown = []
    monkeypatch.setattr(notebook, "display", shown.append)
    notebook.show_completions(4, Table(["Completion"], [["<b>a\nb</b>"]]))
    assert "<td>&lt;b&gt;a\nb&lt;/b&gt;</td>" in shown[0].data
    assert "Step 4" in shown[0].data


def test_a_penalty_counts_a_text_and_not_what_fills_up_its_batch(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(repetition_penalty=3.0, per_device_train_batch_size=8)
    (batch,) = trainer.policy(iter([batches_of(trainer)]), 0)
    expected = {tuple(prompt + written_alone(trainer.model, prompt, 3.0)) for prompt in PROMPTS}
    assert {text for _, text in prompts_and_texts(batch)} == expected
    assert expected != {tuple(prompt + written_alone(trainer.model, prompt)) for prompt in PROMPTS}


def test_a_mode_seeking_divergence_of_text_that_was_written_before_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for divergence in ("forward_kl", "reverse_kl"):
        make_config(tmp_path, divergence=divergence, on_policy_share=1.0, steps_per_generation=4)
    (record,) = caplog.records
    assert "reverse_kl" in record.getMessage()
    assert "up to 3 steps before" in record.getMessage()
    caplog.clear()
    for divergence in ("forward_kl", "jsd"):
        make_config(tmp_path, divergence=divergence, on_policy_share=1.0, replay_share=0.25)
    (record,) = caplog.records
    assert "replay_share=0.25: jsd is a mean over the text of the student as it is" in record.getMessage()


def test_what_was_not_ended_can_be_left_out_and_ends_of_the_teacher_end(
    build: Callable[..., DistillationTrainer],
) -> None:
    trainer = build(mask_truncated_completions=True, per_device_train_batch_size=8)
    (batch,) = trainer.policy(iter([[next(iter(trainer.get_train_dataloader()))]]), 0)
    learned = {len(row["input_ids"]): any(label != IGNORED for label in row["labels"]) for row in rows_of(batch)}
    ended = {len(PROMPTS[i]) + len(ids): ids[-1] in ENDS for i, ids in enumerate(completions_of(trainer.model))}
    assert learned == ended
    assert {*ended.values()} == {True, False}

    first = written_alone(trainer.model, PROMPTS[0])[0]
    teacher = LiveTeacher(tiny_llama(2).double(), trainer.processing_class)
    teacher.model.generation_config.eos_token_id = [first]
    trainer = build(teacher=teacher, per_device_train_batch_size=1)
    (batch,) = trainer.policy(iter([[next(iter(trainer.get_train_dataloader()))]]), 0)
    assert batch["input_ids"].tolist() == [[*PROMPTS[0], first]]


def test_a_student_that_writes_nothing_and_one_that_never_ends_are_trained(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    for direction in (1e3, -1e3):
        student = tiny_llama(1, hidden=16, attention_bias=False).double()
        head = torch.nn.Linear(16, VOCAB).double()
        torch.nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.bias[tokenizer.eos_token_id] = direction
        student.lm_head = head
        trainer = build(student=student, sampling_temperature=1.0, learning_rate=1e-3)
        trainer.train()
        assert trainer.state.log_history[0]["completion_length"] == (1 if direction > 0 else 5)
        assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


def test_a_teacher_that_is_the_student_teaches_nothing_of_its_text(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    itself = LiveTeacher(tiny_llama(1, hidden=16).double(), tokenizer)
    trainer = build(teacher=itself, divergence="reverse_kl", sampling_temperature=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_prompts_alone_are_enough(
    build: Callable[..., DistillationTrainer],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    prompts = DATA["prompt and completion"]["prompt"]
    if kind == "conversation":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    trainer = build(Dataset.from_dict({"prompt": prompts}), per_device_train_batch_size=8)
    (batch,) = trainer.policy(iter([[next(iter(trainer.get_train_dataloader()))]]), 0)
    asked = {tokenizer.decode(prompt_of(row)) for row in rows_of(batch)}
    assert asked == {f"U:x = {i}\nA:" if kind == "conversation" else f"x = {i}" for i in range(8)}


def test_sampling_disturbs_nothing_else_that_is_random(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(sampling_temperature=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    before = torch.get_rng_state()
    first, second = (trainer.policy(iter([[batch]]), 0)[0]["input_ids"] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second), "the step decides"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy_share": 1.5}, "from 0 to 1"),
        ({"on_policy_share": 0.0}, "max_completion_length .on_policy_share is 0.0"),
        ({"packing": True}, "packing .what the student writes is not packed"),
        ({"sampling_temperature": 0.0, "top_p": 0.5}, "top_p and top_k"),
        ({"ce_weight": 0.5}, "which it does not imitate"),
        ({"kd_weight": 0.0, "ce_weight": 1.0, "on_policy_share": 0.5}, "nothing is learned of what the student"),
        ({"on_policy_divergence_kwargs": {"beta": 0.1}}, "there is no on_policy_divergence"),
        ({"on_policy_divergence": "jds"}, "Did you mean 'jsd'"),
        ({"num_generations": 2}, "the same text each time"),
        ({"num_completions_to_print": 2}, "num_completions_to_print .log_completions is off"),
        ({"log_completions": True, "on_policy_share": 0.0} | NOT_WRITTEN, "log_completions .on_policy_share is 0.0"),
        ({"replay_share": 1.0}, "leaves nothing to write"),
        ({"replay_size": 9}, "replay_size .replay_share is 0.0"),
        ({"num_generations": 4, "sampling_temperature": 1.0}, "must divide per_device_train_batch_size=2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be positive"),
        ({"steps_per_generation": 2, "on_policy_share": 0.0} | NOT_WRITTEN, "steps_per_generation .on_policy_share is"),
        (
            {"max_completion_length": 120},
            "row 1: a prompt of 9 tokens .* student's context of 128.* of 2 of its 8 rows",
        ),
        ({"data": DATA["text"]}, "row 0: on_policy_share needs prompts, .* begins with what is to be learned"),
        ({"data": DATA["prompt and completion"].remove_columns("completion"), "on_policy_share": 0.5}, "it has none"),
    ],
)
def test_what_cannot_be_is_refused(
    build: Callable[..., DistillationTrainer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options).train()


def test_a_policy_and_an_option_for_another_are_one_too_many(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    args = make_config(tmp_path, on_policy_share=1.0)
    with pytest.raises(ValueError, match="the policy is another"):
        DistillationTrainer(tiny_llama(1), tiny_llama(2), args, train_dataset=DATA["chat"], policy=OnPolicy(args, 0))

"""The teacher writes as transformers' own `generate` would."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import save
from tiny import tiny_llama
from transformers import ContinuousBatchingConfig, PreTrainedTokenizerBase
from writing import ENDS, GREEDY, write_alone

from llm_distill.generation import Prompt, Sampling, TransformersEngine, prompts_of
from llm_distill.models import LanguageModel


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"continuous": True}], ids=str)
def test_batches_write_what_each_prompt_alone_would_get(
    teacher: LanguageModel, prompts: list[Prompt], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(ContinuousBatchingConfig, num_blocks=16, max_batch_tokens=256)  # by default most of the memory
    monkeypatch.setattr("llm_distill.generation.engines.transformers.ContinuousBatchingConfig", small)
    answers = {a.prompt.id: a for a in TransformersEngine(teacher, GREEDY, **options).write(prompts)}
    assert len(answers) == len(prompts)
    for prompt in prompts:
        (completion,) = answers[prompt.id].completions
        assert [completion.ids] == write_alone(teacher, prompt)
        assert completion.tokens == len(completion.ids)
        assert completion.finished == (completion.ids[-1] in ENDS)


def test_beams_are_those_of_transformers(teacher: LanguageModel, prompts: list[Prompt]) -> None:
    sampling = Sampling(num_completions=2, num_beams=3, temperature=0, max_new_tokens=6)
    for answer in TransformersEngine(teacher, sampling, batch_size=4).write(prompts):
        expected = write_alone(teacher, answer.prompt, num_beams=3, num_return_sequences=2)
        assert [completion.ids for completion in answer.completions] == expected


def test_the_checkpoints_own_way_to_sample_does_not_matter(teacher: LanguageModel, prompts: list[Prompt]) -> None:
    engine = TransformersEngine(teacher, GREEDY)
    before = [answer.completions for answer in engine.write(prompts)]
    own = teacher.model.generation_config
    own.repetition_penalty, own.min_new_tokens = 5.0, 6
    try:
        assert [answer.completions for answer in engine.write(prompts)] == before
    finally:
        own.repetition_penalty, own.min_new_tokens = None, None


def test_sampling_draws_from_the_teacher(teacher: LanguageModel) -> None:
    (prompt,) = prompts_of([{"prompt": "import "}])
    sampling = Sampling(num_completions=3000, max_new_tokens=1)
    (answer,) = TransformersEngine(teacher, sampling).write([prompt])
    ids = teacher.tokenizer(prompt.content, return_tensors="pt")
    with torch.no_grad():
        p = teacher.model(**ids).logits[0, -1].softmax(-1)
    drawn = (
        torch.bincount(torch.tensor([completion.ids[0] for completion in answer.completions]), minlength=len(p)) / 3000
    )
    assert float((drawn - p).abs().sum()) < 1.5 * float((p * (1 - p) / 3000).sqrt().sum())


def test_a_run_can_be_repeated(teacher: LanguageModel, prompts: list[Prompt]) -> None:
    def texts(seed: int) -> list[str]:
        engine = TransformersEngine(teacher, Sampling(max_new_tokens=6, seed=seed))
        return [answer.completions[0].text for answer in engine.write(prompts)]

    assert texts(1) == texts(1) != texts(2)


def test_mean_log_prob_is_the_teachers(teacher: LanguageModel, prompts: list[Prompt]) -> None:
    sampling = Sampling(num_completions=2, max_new_tokens=6)
    for answer in TransformersEngine(teacher, sampling, batch_size=4, score=True).write(prompts):
        for completion in answer.completions:
            ids = torch.tensor([answer.prompt_ids + completion.ids])
            with torch.no_grad():
                log_p = teacher.model(ids).logits[0].double().log_softmax(-1)
            start = len(answer.prompt_ids)
            expected = [float(log_p[start + n - 1, token]) for n, token in enumerate(completion.ids)]
            assert completion.mean_log_prob == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_completions": 0}, "num_completions must be at least 1"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"temperature": 0, "top_p": 0.9}, "without effect here"),
        ({"num_beams": 2}, "set sampling_temperature=0"),
        ({"num_completions": 2, "temperature": 0}, "the same text each time"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_llama(2), tmp_path / "bare")
    with pytest.raises(ValueError, match="came without a tokenizer"):
        TransformersEngine(LanguageModel.load(str(folder)), GREEDY)


def test_pad_and_end_may_be_the_same(teacher: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    engine = TransformersEngine(teacher, GREEDY)
    completion = engine.cut_after_end([5, 6, 0, 0, 0])
    assert (completion.ids, completion.finished) == ([5, 6, 0], True)
    assert not engine.cut_after_end([5, 6, 7]).finished


def test_a_row_that_is_no_token_is_never_written(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama(0, vocab_size=4 * len(tokenizer))
    engine = TransformersEngine(LanguageModel(model, tokenizer), Sampling(max_new_tokens=64))
    for _, (completion,) in engine.complete([[1, 2, 3]] * 4):
        assert completion.ids
        assert max(completion.ids) < len(tokenizer)

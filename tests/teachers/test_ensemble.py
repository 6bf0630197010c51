"""Mixtures of teachers of every kind, from a list of options to the step that the student takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import fill_cache, first_batch, logged, logits_at, make_trainer, save
from tiny import VOCAB, make_config, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from worker import make_rows

from llm_distill import CachedTeacher, DistillationTrainer, EnsembleTeacher, LiveTeacher, TeacherCache
from llm_distill.cache.methods import Hidden, Hybrid, Method, TopK
from llm_distill.divergences import ForwardKL, ReverseKL
from llm_distill.rows import View, texts_of
from llm_distill.teachers.options import parse_teachers

EXACT = TopK(VOCAB, step=2**-17)
WHOLE = Hidden("float32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> list[Path]:
    """Two teachers as a user has them."""
    root = tmp_path_factory.mktemp("models")
    return [save(tiny_llama(seed), root / str(seed), tokenizer) for seed in (2, 3)]


@pytest.fixture(scope="module")
def capture_rows(
    tmp_path_factory: pytest.TempPathFactory, models: list[Path], tokenizer: PreTrainedTokenizerBase
) -> Callable[..., Path]:
    """Fills a cache with what one of the teachers says about some rows."""

    def of(number: int, method: Method, rows: Any = None, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("cache")
        trainer = make_trainer(
            folder, tokenizer, tiny_llama(1), teacher_model_name_or_path=str(models[number]), **options
        )
        if rows is not None:
            trainer.train_dataset = trainer.train_dataset.select(rows)
        fill_cache(trainer, folder / "cache", method)
        return folder / "cache"

    return of


def run(folder: Path, tokenizer: PreTrainedTokenizerBase, teacher: Any = None, **options: Any) -> DistillationTrainer:
    trainer = make_trainer(folder, tokenizer, tiny_llama(1, hidden=16), teacher, **options)
    trainer.train()
    return trainer


def live(seed: int, tokenizer: PreTrainedTokenizerBase) -> LiveTeacher:
    return LiveTeacher(tiny_llama(seed), tokenizer)


def p_of(model: PreTrainedModel, view: View) -> Tensor:
    return logits_at(model, view).double().softmax(-1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_live_teacher_with_its_own_full_cache_is_the_live_one(
    divergence: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    models: list[Path],
    capture_rows: Callable[..., Path],
) -> None:
    teachers = [{"model": str(models[0]), "weight": 2}, {"cache": str(capture_rows(0, EXACT, divergence=divergence))}]
    mixed = run(tmp_path / "a", tokenizer, teachers=teachers, divergence=divergence)
    alone = run(tmp_path / "b", tokenizer, teacher_model_name_or_path=str(models[0]), divergence=divergence)
    for name in ("loss", "kd", "top1_agreement"):
        assert logged(mixed, name) == pytest.approx(logged(alone, name), rel=2e-3, abs=1e-6), name
    assert max(logged(mixed, "disagreement")) < 1e-4


def test_what_others_keep_on_disk_is_mixed_as_if_they_were_here(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, models: list[Path], capture_rows: Callable[..., Path]
) -> None:
    short = {str(models[0]): 3, str(models[1]): 1}
    here = run(tmp_path / "a", tokenizer, teachers=short, loss_temperature=2.0, mixture="geometric")
    stored = [
        {"cache": str(capture_rows(number, WHOLE)), "weight": weight, "name": str(number)}
        for number, weight in ((0, 3), (1, 1))
    ]
    for workers in (0, 1):
        cached = run(
            tmp_path / str(workers),
            tokenizer,
            teachers=stored,
            loss_temperature=2.0,
            mixture="geometric",
            dataloader_num_workers=workers,
        )
        assert logged(cached, "kd") == pytest.approx(logged(here, "kd"), rel=1e-5)
        assert logged(cached, "disagreement") == pytest.approx(logged(here, "disagreement"), rel=1e-4)


@pytest.mark.parametrize("by", ["likelihood", "entropy", "best", "a function"])
def test_weights_by_row_are_those_of_the_definition(
    by: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    members, tau = [live(2, tokenizer), live(3, tokenizer)], 0.25
    options: dict[str, Any] = {"mixture": "best"} if by == "best" else {"weights_by": by, "temperature": tau}
    if by == "a function":
        options = {
            "weights": lambda view, signals: torch.stack([view.positions.position, 1 + view.positions.sample], -1)
        }
    else:
        options["weights"] = [1, 3]
    teacher = EnsembleTeacher(members, **options)
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), teacher)
    view = View.of(first_batch(trainer))
    ps = [p_of(member.model, view) for member in members]
    targets = view.positions.targets
    prior = torch.tensor([0.25, 0.75], dtype=torch.float64).expand(len(targets), 2)
    if by == "entropy":
        weights = prior * torch.stack([(p * p.log()).sum(-1) / tau for p in ps], -1).exp()
    elif by == "a function":
        weights = torch.stack([view.positions.position, 1 + view.positions.sample], -1).double()
    else:
        log_text = torch.stack([p.gather(-1, targets[:, None])[:, 0].log() for p in ps], -1)
        for text in texts_of(view.positions):
            log_text[text.rows] = log_text[text.rows].mean(0)
        likely = (log_text == log_text.amax(-1, keepdim=True)).double()
        weights = likely if by == "best" else prior * (log_text / tau).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    signal = teacher.score(view)
    torch.testing.assert_close(signal.weights.double(), weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signal.weights.sum(-1), torch.ones(len(targets)))
    expected = sum(w[:, None] * p for w, p in zip(weights.T, ps, strict=True))
    q = p_of(trainer.model, view)
    trainer.train()
    kd = float((expected * (expected.log() - q.log())).sum(-1).mean())
    assert logged(trainer, "kd")[0] == pytest.approx(kd, rel=1e-4)


def test_a_text_that_one_cache_lacks_is_left_to_the_others(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    models: list[Path],
    capture_rows: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = capture_rows(0, WHOLE, range(12)), capture_rows(1, WHOLE, range(1, 20))
    caches = [{"cache": str(first), "name": "a"}, {"cache": str(second), "name": "b"}]
    with pytest.raises(ValueError, match="on_miss: skip at this cache leaves such texts to the others"):
        make_trainer(tmp_path, tokenizer, tiny_llama(1), teachers=caches)
    for cache in caches:
        cache["on_miss"] = "skip"
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), teachers=caches, max_steps=12)
    assert "a 12, b 19; 11 of 20 (55 %) are in all of them" in caplog.text
    view, both = (
        View.of(first_batch(trainer)),
        [p_of(tiny_llama(seed), View.of(first_batch(trainer))) for seed in (2, 3)],
    )
    p = torch.where(view.positions.sample[:, None] == 0, both[0], (both[0] + both[1]) / 2)
    q = p_of(trainer.model, view)
    trainer.train()
    assert logged(trainer, "kd")[0] == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)
    assert logged(trainer, "skipped_share") == [0.0] * 10 + [1.0] * 2


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_a_row_is_taught_by_the_teacher_that_it_names(
    kind: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    models: list[Path],
    capture_rows: Callable[..., Path],
) -> None:
    names = ["law", "code"]
    rows = make_rows([]).map(lambda row, number: {"teacher": names[number % 2]}, with_indices=True)
    if kind == "live":
        entries = [{"model": str(model), "name": name} for model, name in zip(models, names, strict=True)]
    else:
        caches = [capture_rows(number, WHOLE, range(number, 24, 2)) for number in (0, 1)]
        entries = [{"cache": str(cache), "name": name} for cache, name in zip(caches, names, strict=True)]

    def trainer(rows: Any, **options: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model=tiny_llama(1, hidden=16),
            args=make_config(
                tmp_path / "out",
                teachers=entries,
                train_sampling_strategy="sequential",
                dataset_kwargs={"skip_prepare_dataset": True},
                **{"max_length": None, **options},
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )

    made = trainer(rows)
    view = View.of(first_batch(made))
    both = [p_of(tiny_llama(seed), view) for seed in (2, 3)]
    p = torch.where(view.positions.sample[:, None] == 0, *both)
    q = p_of(made.model, view)
    made.train()
    assert logged(made, "kd")[0] == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-4)
    unknown = rows.map(lambda row, number: {"teacher": None if number == 5 else "law"}, with_indices=True)
    with pytest.raises(ValueError, match="row 5 has None, where there are law, code"):
        trainer(unknown)


def test_a_vote_is_learned_as_text_that_was_voted_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    seeds, weights = (2, 3, 4), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    teacher = EnsembleTeacher([live(seed, tokenizer) for seed in seeds], [2, 1, 1], mixture="vote")
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), teacher, loss_temperature=2.0)
    view = View.of(first_batch(trainer))
    votes = torch.stack([p_of(tiny_llama(seed), view).argmax(-1) for seed in seeds], -1)
    p = torch.zeros(len(votes), VOCAB, dtype=torch.float64).scatter_add(-1, votes, weights.expand(len(votes), 3))
    log_q = (logits_at(trainer.model, view).double() / 2).log_softmax(-1)
    trainer.train()
    kd = 4 * (p * (p.clamp(min=1e-300).log() - log_q)).sum(-1).mean()
    assert logged(trainer, "kd")[0] == pytest.approx(float(kd), rel=1e-4)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean()
    assert logged(trainer, "disagreement")[0] == pytest.approx(float(entropy), rel=1e-4)


def test_what_a_mixture_says_is_stored_once_and_read_as_one_teacher(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, models: list[Path], capture_rows: Callable[..., Path]
) -> None:
    entries = [{"model": str(models[0])}, {"cache": str(capture_rows(1, TopK(24))), "weight": 2}]
    live_run = run(tmp_path / "a", tokenizer, teachers=entries)
    folder = tmp_path / "mixed"
    fill_cache(live_run, folder, TopK(live_run.teacher.k, step=2**-17))
    cached = run(tmp_path / "b", tokenizer, teachers=entries, teacher_cache=str(folder))
    assert isinstance(cached.teacher, CachedTeacher)
    assert logged(cached, "kd")[0] == pytest.approx(logged(live_run, "kd")[0], rel=1e-3)
    others = [entries[0], {"cache": entries[1]["cache"]}]
    for changed, message in (
        ({"teachers": entries, "mixture": "best"}, r"teacher\.mixture: the cache has 'mean', asked for is 'best'"),
        ({"teachers": others}, r"teacher\.weights: the cache has \[0.33"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tokenizer, tiny_llama(1), teacher_cache=str(folder), **changed)


def test_what_cannot_be_mixed_is_refused_with_the_way_out(
    tokenizer: PreTrainedTokenizerBase, capture_rows: Callable[..., Path]
) -> None:
    top, draws = (CachedTeacher(TeacherCache(capture_rows(0, method))) for method in (TopK(8), Hybrid(0.05)))
    alive = live(2, tokenizer)
    for members, options, message in (
        ([alive, draws], {}, "fair draws .* beside a teacher that tells everything"),
        ([draws, draws], {"mixture": "vote"}, "has no vote"),
        ([alive, top], {"mixture": "geometric"}, "multiplies whole distributions"),
        ([alive, top], {"mixture": "majority"}, "mixture must be one of"),
        ([alive, top], {"mixture": "best", "weights_by": "entropy"}, "would have no effect"),
        ([alive, top], {"names": ["a", "a"]}, "as many different names"),
    ):
        with pytest.raises(ValueError, match=message):
            EnsembleTeacher(members, **options).check(ForwardKL(), 1.0)
    with pytest.raises(ValueError, match="gives a token nothing, as votes do"):
        EnsembleTeacher([alive, top], mixture="vote").check(ReverseKL(), 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0, -1.0]], "in row 0: they must be finite and not negative"),
        ([[1.0, float("nan")]], "in row 0"),
        ([[0.0, 0.0]], "one must be positive"),
        ([[1.0]], "must give a weight for each row and teacher"),
    ],
)
def test_what_a_router_gives_is_checked(
    given: list[list[float]], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def route(view: View, signals: Any) -> Tensor:
        return torch.tensor(given).expand(len(view.positions.sample), -1)

    teacher = EnsembleTeacher([live(2, tokenizer), live(3, tokenizer)], route)
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), teacher)
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([{"model": "a", "weight": -1}], r"teachers\[0\] has weight=-1, and a weight must be positive"),
        ([{"model": "a", "weight": float("nan")}], "weight=nan"),
        ({"a": 0, "b": 0}, "weight=0"),
        ([{"weight": 1}], "must be a model, a cache or a server"),
        ([{"modell": "a"}], "has no 'modell', only model, cache"),
        ([{"model": "a"}, {"model": "a"}], "has 'a' twice"),
        ("a", "must be a list of mappings"),
    ],
)
def test_a_list_of_teachers_is_checked_before_one_is_loaded(teachers: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, teachers=teachers)


def test_teachers_are_a_list_or_models_with_their_weights() -> None:
    assert parse_teachers("teachers", "{a: 2, b: 1}") == [
        {"model": "a", "weight": 2, "name": "a"},
        {"model": "b", "weight": 1, "name": "b"},
    ]
    assert parse_teachers("teachers", "[{cache: c}, {server: 'http://d', model: e}]") == [
        {"cache": "c", "name": "c"},
        {"server": "http://d", "model": "e", "name": "http://d"},
    ]
    assert parse_teachers("teachers", None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": {"a": 1}, "teacher_model_name_or_path": "b"}, "teachers says who they are"),
        ({"mixture": "vote"}, r"mixture \(there is no teachers\)"),
        ({"teachers": {"a": 1}, "mixture_temperature": 2.0}, "mixture_weights is fixed"),
        ({"teachers": {"a": 1}, "mixture": "best", "mixture_weights": "entropy"}, "gives all weight to one teacher"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)

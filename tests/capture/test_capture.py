"""`llm-distill capture` and `inspect`: what they say, what they refuse, and what they leave alone."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from datasets import Dataset, IterableDataset
from runs import fill_cache, make_trainer
from tiny import VOCAB, tiny_llama
from transformers import PreTrainedTokenizerBase
from worker import make_rows

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher, TeacherCache
from llm_distill.cache import Hidden, Hybrid, Sampled, TopK, manifest
from llm_distill.cache.codec import decode
from llm_distill.cache.methods import Method
from llm_distill.capture.fidelity import as_table, effective_target, explain
from llm_distill.capture.report import measure_fidelity
from llm_distill.cli import main
from llm_distill.losses.fused import cpp_backend
from llm_distill.models import LanguageModel
from llm_distill.rows import View, examples_of


@pytest.fixture
def trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DistillationTrainer]:
    def make(rows: Dataset | None = None, teacher_seed: int = 2, **options: Any) -> DistillationTrainer:
        teacher = options.pop("teacher", None) or LiveTeacher(tiny_llama(teacher_seed), tokenizer)
        made = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), teacher, **options)
        made.train_dataset = make_rows([]) if rows is None else rows
        return made

    return make


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("shard-*")}


@pytest.fixture
def flags(tmp_path: Path, saved: Path) -> list[str]:
    """A run over thirty texts with a cache in `tmp_path / "cache"`."""
    data = tmp_path / "data.jsonl"
    Dataset.from_dict({"text": [f"import os\nx = {i}\nprint(x)" for i in range(30)]}).to_json(data)
    run = {
        "model_name_or_path": saved / "student",
        "teacher_model_name_or_path": saved / "teacher",
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "teacher_cache": tmp_path / "cache",
        "max_length": 64,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    return [part for name, value in run.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize(("divergence", "method"), [("forward_kl", Hybrid), ("jsd", TopK)])
def test_what_is_kept_by_default_is_what_teaches_best(
    tmp_path: Path, flags: list[str], divergence: str, method: type
) -> None:
    main(["capture", *flags, "--divergence", divergence])
    assert isinstance(TeacherCache.open(tmp_path / "cache").method, method)
    main(["train", *flags, "--divergence", divergence, "--max_steps", "1"])


def test_the_command_line_captures_trains_and_inspects(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    main(["capture", *flags, "--cache_method", "top_k", "--cache_kwargs", '{"k": 8}', "--loss_temperature", "2"])
    said = capsys.readouterr().out
    for part in ("bytes and", "tokens are left", "TopK(k=8", "temperature 2", "bytes a token", "gradient error"):
        assert part in said, part
    assert (cache / "fidelity.png").stat().st_size > 10_000
    main(["train", *flags, "--max_steps", "2", "--loss_temperature", "2"])
    main(["inspect", str(cache)])
    said = capsys.readouterr().out
    for part in ("30 texts", "shards are whole", "gradient error"):
        assert part in said, part
    main(["inspect", str(cache), *flags, "--loss_temperature", "2"])
    path = next(cache.glob("shard-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit):
        main(["inspect", str(cache)])
    assert path.name in capsys.readouterr().err


def test_more_data_adds_what_is_missing(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    rows = make_rows([])
    fill_cache(trainer(rows.select(range(10))), tmp_path / "cache", TopK(8))
    first = names(tmp_path / "cache")
    cache = fill_cache(trainer(rows), tmp_path / "cache", TopK(8))
    assert first < names(tmp_path / "cache")
    assert len(cache) == 24
    fill_cache(trainer(rows), tmp_path / "cache", TopK(8))
    assert len(names(tmp_path / "cache")) == 2


def test_a_damaged_shard_is_named_and_captured_again_alone(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    fill_cache(trainer(), folder, Hybrid(0.05), examples_per_shard=8)
    whole = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    path = sorted(folder.glob("shard-*"))[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("llm_distill", "llm_distil", 1).replace('"rows"', '"row"'))
    manifest.write_text(manifest.read_text()[:-20])
    fill_cache(trainer(), folder, Hybrid(0.05), examples_per_shard=8)
    assert path.name in caplog.text
    assert "manifest.json is damaged" in caplog.text
    assert names(folder) == set(whole)
    touched = [path.name for path in folder.glob("shard-*") if path.stat().st_mtime_ns != whole[path.name]]
    assert touched == [path.name]


def test_what_is_stale_goes_only_when_told_to(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    folder = tmp_path / "cache"
    fill_cache(trainer(), folder, TopK(8))
    before = names(folder)
    for other, method, field in (
        (trainer(teacher_seed=3), TopK(8), r"teacher\.weights: the cache has"),
        (trainer(), TopK(9), r"method\.k: the cache has 8, asked for is 9"),
        (trainer(loss_temperature=2.0), TopK(8), r"temperature: the cache has 1.0, asked for is 2.0"),
    ):
        with pytest.raises(ValueError, match=field) as error:
            fill_cache(other, folder, method)
        assert "--drop_stale" in str(error.value)
        assert names(folder) == before
    fill_cache(trainer(), folder, TopK(9), drop_stale=True)
    assert names(folder).isdisjoint(before)
    assert TeacherCache(folder).method == TopK(9)


def test_a_cache_of_an_older_format_goes_only_when_told_to(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    with monkeypatch.context() as earlier:
        earlier.setattr(manifest, "VERSION", manifest.VERSION - 1)
        fill_cache(trainer(), folder, TopK(8))
    before = names(folder)
    with pytest.raises(ValueError, match="no longer reads: capture again, with --drop_stale"):
        fill_cache(trainer(), folder, TopK(8))
    (folder / manifest.FILE).rename(tmp_path / manifest.FILE)  # shards alone are not taken for those of today either
    with pytest.raises(ValueError, match="holds another cache"):
        fill_cache(trainer(), folder, TopK(8))
    (tmp_path / manifest.FILE).rename(folder / manifest.FILE)
    assert names(folder) == before
    fill_cache(trainer(), folder, TopK(8), drop_stale=True)
    assert names(folder).isdisjoint(before)
    assert len(TeacherCache(folder)) == len(make_rows([]))


def test_two_captures_into_one_folder_are_refused(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    fill_cache(trainer(), tmp_path / "cache", TopK(8))
    with (
        filelock.FileLock(tmp_path / "cache" / ".lock"),
        pytest.raises(ValueError, match=r"another capture, .* is writing into"),
    ):
        fill_cache(trainer(), tmp_path / "cache", TopK(8))


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], place: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        fill_cache(trainer(), tmp_path / place, TopK(8))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").touch()
    with pytest.raises(ValueError, match=r"is not a teacher cache and has other things in it, such as holiday\.png"):
        fill_cache(trainer(), tmp_path / "photos", TopK(8))


def test_no_room_on_the_disk_is_said_before_it_starts(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(ValueError, match=r"GB are needed in .* are free. Make room, or keep less"):
        fill_cache(trainer(), tmp_path / "cache", TopK(8))
    assert not names(tmp_path / "cache")


def test_what_cannot_be_captured_is_refused(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    empty = make_rows([]).select([])
    with pytest.raises(ValueError, match="has no texts"):
        fill_cache(trainer(empty), tmp_path / "cache", TopK(8))
    without = make_trainer(tmp_path, tokenizer, tiny_llama(1), kd_weight=0.0, ce_weight=1.0)
    with pytest.raises(ValueError, match="there is no live teacher to capture"):
        fill_cache(without, tmp_path / "cache", TopK(8))
    several = EnsembleTeacher([LiveTeacher(tiny_llama(seed), tokenizer) for seed in (2, 3)])
    with pytest.raises(ValueError, match="method=hidden needs one teacher with its head"):
        fill_cache(trainer(teacher=several), tmp_path / "cache", Hidden())


def test_an_ensemble_is_captured_as_its_mixture(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    teachers = [LiveTeacher(tiny_llama(seed), tokenizer) for seed in (2, 3)]
    made = trainer(teacher=EnsembleTeacher(teachers, [3, 1]))
    cache = fill_cache(made, tmp_path / "cache", TopK(VOCAB, step=2**-17))
    batch = made.data_collator([made.train_dataset[0]])
    p = sum(
        w * teacher.head(teacher.score(View.of(batch)).hidden).softmax(-1)
        for w, teacher in zip((0.75, 0.25), teachers, strict=True)
    )
    stored = decode(cache.method, [columns for _, columns in cache.examples() if columns["rows"] == len(p)])
    errors = [
        (effective_target(stored, torch.ones(len(stored.ids), VOCAB))[i : i + len(p)] - p).abs().max()
        for i in range(0, len(stored.ids), len(p))
    ]
    assert min(errors) < 1e-3


def test_draws_depend_on_the_text_alone(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    found = []
    for name, size, rows in (("a", 2, make_rows([])), ("b", 5, make_rows([]).shuffle(seed=1))):
        cache = fill_cache(trainer(rows, per_device_eval_batch_size=size), tmp_path / name, Sampled(20))
        found.append(dict(cache.examples()))
    assert set(found[0]) == set(found[1])
    same = [found[0][key] == found[1][key] for key in found[0]]
    assert sum(same) >= 0.9 * len(same)  # a float's last bit may turn a draw
    other = dict(fill_cache(trainer(seed=7), tmp_path / "c", Sampled(20)).examples())
    assert sum(other[key] == found[0][key] for key in other) <= 0.1 * len(same)


def test_fidelity_tells_good_from_bad(trainer: Callable[..., DistillationTrainer]) -> None:
    methods = [TopK(4), TopK(64), TopK(VOCAB, step=2**-17), Hidden("float32"), Hybrid(0.02), Sampled(20)]
    names = ("few", "many", "all", "hidden", "hybrid", "sampled")
    made = trainer()
    student = LanguageModel(made.model, made.processing_class)
    found = dict(zip(names, measure_fidelity(made.teacher, student, made.data, methods).values(), strict=True))
    assert found["few"].gradient_error > found["many"].gradient_error > found["all"].gradient_error
    assert found["few"].kl > found["many"].kl > found["all"].kl >= 0
    for name in ("all", "hidden"):
        assert found[name].gradient_error < 1e-3
        assert found[name].gradient_cosine == pytest.approx(1, abs=1e-6)
        assert found[name].coverage == pytest.approx(1, abs=1e-5)
    assert found["hybrid"].gradient_error < found["sampled"].gradient_error
    assert math.isinf(found["hybrid"].kl)
    assert found["few"].bytes_per_token < found["many"].bytes_per_token
    row = as_table({"hybrid": found["hybrid"]}).rows[0]
    assert (row[2], row[5]) == ("", "none"), "of draws there is no KL, and their noise is no bias"
    assert "drawn at random" in explain(found["hybrid"])
    assert "drawn at random" not in explain(found["few"])
    assert list(measure_fidelity(made.teacher, student, made.data, methods, seconds=0)) == [str(methods[0])]
    itself = measure_fidelity(made.teacher, made.teacher.language_model, made.data, methods[:1])
    assert math.isinf(itself[str(methods[0])].gradient_error), "where there is nothing to learn any error is too much"


def test_a_folder_of_somebody_elses_shards_is_left_alone(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer]
) -> None:
    (tmp_path / "data").mkdir()
    theirs = tmp_path / "data" / "shard-00000.parquet"
    theirs.write_bytes(b"rows")
    with pytest.raises(ValueError, match=r"has other things in it, such as shard-00000\.parquet"):
        fill_cache(trainer(), tmp_path / "data", TopK(8), drop_stale=True)
    assert theirs.read_bytes() == b"rows"


def test_a_lost_manifest_does_not_cost_the_shards(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    folder = tmp_path / "cache"
    fill_cache(trainer(), folder, TopK(8))
    before = names(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"holds another cache. shard-.* is of another teacher, tokenizer or method"):
        fill_cache(trainer(), folder, TopK(9))
    assert names(folder) == before
    assert len(fill_cache(trainer(), folder, TopK(8))) == 24
    assert names(folder) == before


@pytest.mark.parametrize("method", [TopK(8), Hybrid(0.05), Sampled(20), Hidden("float32")], ids=str)
def test_a_teacher_that_gives_nan_is_not_stored(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase, method: Method
) -> None:
    broken = tiny_llama(2)
    with torch.no_grad():
        broken.model.embed_tokens.weight[torch.tensor(make_rows([])[5]["input_ids"])] = math.nan
    with pytest.raises(ValueError, match=r"the teacher gave NaN or infinity for .* positions, first in row"):
        fill_cache(trainer(teacher=LiveTeacher(broken, tokenizer)), tmp_path / "cache", method)


def test_what_training_would_refuse_is_refused_before_it_is_captured(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer]
) -> None:
    with pytest.raises(ValueError, match="unbiased gradient for forward_kl only"):
        fill_cache(trainer(divergence="reverse_kl"), tmp_path / "cache", Sampled(20))


def test_streams_are_captured_too(tmp_path: Path, trainer: Callable[..., DistillationTrainer]) -> None:
    whole = fill_cache(trainer(), tmp_path / "whole", TopK(8), examples_per_shard=7)
    stream = fill_cache(trainer(make_rows([]).to_iterable_dataset()), tmp_path / "s", TopK(8), examples_per_shard=7)
    assert {shard.name for shard in stream.shards} == {shard.name for shard in whole.shards}
    with pytest.raises(ValueError, match="nothing counts in the texts"):
        fill_cache(trainer(IterableDataset.from_generator(lambda: iter(()))), tmp_path / "empty", TopK(8))


def test_texts_in_which_nothing_counts_are_passed_over(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer]
) -> None:
    made = trainer(make_rows([0, 7, 23]), per_device_eval_batch_size=1)
    assert len(fill_cache(made, tmp_path / "cache", TopK(8))) == 21


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_temperature_in_bfloat16_keeps_the_bound(
    is_compiled: bool,
    tmp_path: Path,
    trainer: Callable[..., DistillationTrainer],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_compiled:
        monkeypatch.setattr(cpp_backend, "compiled", lambda *_: None)
    teacher = LiveTeacher(tiny_llama(2).to(torch.bfloat16), tokenizer)
    made = trainer(teacher=teacher, loss_temperature=1.5, per_device_eval_batch_size=1)
    cache = fill_cache(made, tmp_path / "cache", TopK(VOCAB, step=2**-17))
    batch = made.data_collator([made.train_dataset[0]])
    with torch.no_grad():
        exact = (teacher.head(teacher.score(View.of(batch)).hidden).float() / 1.5).log_softmax(-1)
    stored = cache.load(next(iter(examples_of(View.of(batch)))).key)
    rows = decode(cache.method, [stored or {}])
    there = rows.log_weights > -math.inf
    roots = exact.gather(1, rows.ids).div(2).exp()
    assert ((rows.log_weights / 2).exp() - roots)[there].abs().max() <= 3e-5


def test_a_damaged_head_is_reported(
    tmp_path: Path, trainer: Callable[..., DistillationTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = fill_cache(trainer(), tmp_path / "cache", Hidden("int8"))
    assert cache.verify() == []
    head = tmp_path / "cache" / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "cache")])
    assert "head.safetensors" in capsys.readouterr().err

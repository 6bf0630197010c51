"""What a person can get wrong: refused with what was given and the way out, and nothing is left half done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from runs import copied_state, logged
from tiny import VOCAB, make_config, tiny_llama
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import ScriptArguments, SFTConfig

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import train_tokenizer
from llm_distill.data.load import load_data
from llm_distill.files import LOCK_FILE

Build = Callable[..., DistillationTrainer]
Refused = Callable[..., AbstractContextManager[None]]
TEXTS = ["def first(x):\n    return x + 1\n", 'def second(x):\n    return "naïve"\n', "third = 3\n", "fourth = 4\n"]


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Build:
    """A trainer of a tiny student and teacher; what is passed by keyword replaces its arguments or its options."""

    def build_trainer(options: dict[str, Any] | None = None, **arguments: Any) -> DistillationTrainer:
        defaults = {
            "model": tiny_llama(1, hidden=16),
            "train_dataset": Dataset.from_dict({"text": TEXTS}),
            "processing_class": tokenizer,
        }
        if "args" not in arguments:
            defaults["args"] = make_config(tmp_path / "out", train_sampling_strategy="sequential", **(options or {}))
        if "teacher" not in arguments:
            defaults["teacher"] = LiveTeacher(tiny_llama(2), tokenizer)
        return DistillationTrainer(**(defaults | arguments))

    return build_trainer


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Inside, an error whose message has each of `parts`; afterwards, the output folder is as it was, but for the lock
    of a training that has begun.
    """

    def paths() -> list[Path]:
        return sorted(path for path in (tmp_path / "out").rglob("*") if path.name != LOCK_FILE)

    @contextmanager
    def expect(*parts: str, error: type[Exception] = ValueError) -> Iterator[None]:
        before = paths()
        with pytest.raises(error) as caught:
            yield
        for part in parts:
            assert part in str(caught.value)
        assert paths() == before

    return expect


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"kd_weight": -0.5}, ["kd_weight=-0.5", "negative"]),
        ({"ce_weight": -1.0}, ["ce_weight=-1.0", "negative"]),
        ({"kd_weight": float("nan")}, ["kd_weight=nan", "finite"]),
        ({"ce_weight": float("inf")}, ["ce_weight=inf", "finite"]),
        ({"kd_weight": 0.0}, ["kd_weight=0.0", "ce_weight=0.0", "one must be positive"]),
        ({"loss_temperature": 0.0}, ["loss_temperature", "0.0", "positive"]),
        ({"loss_temperature": -2.0}, ["loss_temperature", "-2.0"]),
        ({"loss_temperature": float("nan")}, ["loss_temperature", "nan"]),
        ({"loss_temperature": float("inf")}, ["loss_temperature", "inf"]),
        ({"loss_temperature": 1e-30}, ["loss_temperature=1e-30", "between 0.01 and 1000"]),
        ({"loss_temperature": 1e30}, ["loss_temperature=1e+30", "between 0.01 and 1000"]),
        ({"max_steps": 0}, ["max_steps=0", "nothing would be learned"]),
        ({"max_steps": -5}, ["max_steps=-5", "must be positive, or -1"]),
        ({"max_steps": -1, "num_train_epochs": 0}, ["num_train_epochs=0", "nothing would be learned"]),
        ({"logging_nan_inf_filter": True}, ["logging_nan_inf_filter", "not finite ends the run"]),
        ({"divergence": "jsd", "divergence_kwargs": {"beta": 0}}, ["beta", "got 0", "forward_kl"]),
        ({"divergence": "jsd", "divergence_kwargs": {"beta": 1}}, ["beta", "got 1", "reverse_kl"]),
        ({"divergence": "skew_kl", "divergence_kwargs": {"lam": 0.0}}, ["lam", "got 0.0", "forward_kl"]),
        ({"divergence": "alpha_beta", "divergence_kwargs": {"beta": -1}}, ["alpha_beta", "beta=-1", "forward_kl"]),
        ({"divergence": "foward_kl"}, ["'foward_kl'", "'forward_kl'", "tvd"]),
        ({"divergence": "jsd", "divergence_kwargs": {"bta": 0.5}}, ["'jsd'", "takes beta", "bta"]),
        ({"divergence_kwargs": {"beta": 0.5}}, ["'forward_kl'", "takes no parameter", "beta"]),
        ({"divergence": "jsd", "divergence_kwargs": {"beta": "half"}}, ["'jsd'", "numbers", "'half'"]),
        ({"divergence_kwargs": "[0.5]"}, ["divergence_kwargs", "mapping", "[0.5]"]),
        ({"squared_temperature": False}, ["squared_temperature=False", "loss_temperature=1"]),
        ({"loss_temperature": 2.0, "kd_weight": 0.0, "ce_weight": 1.0}, ["loss_temperature", "kd_weight is 0"]),
        ({"loss_type": "dft"}, ["loss_type", "divergence"]),
        ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor", "soft targets"]),
        ({"teacher_load_in_4bit": True, "teacher_load_in_8bit": True}, ["teacher_load_in_8bit", "4bit"]),
        ({"teacher_adapters_off": True, "kd_weight": 0.0, "ce_weight": 1.0}, ["teacher_adapters_off", "kd_weight"]),
    ],
    ids=str,
)
def test_values_that_cannot_be_and_options_without_effect_are_refused(
    build: Build, refused: Refused, options: dict[str, Any], parts: list[str]
) -> None:
    with refused(*parts):
        build(options)


@pytest.mark.parametrize(
    ("options", "arguments", "parts"),
    [
        ({}, {"teacher": "no/such-teacher"}, ["'no/such-teacher'", "HF_TOKEN", "HF_HUB_OFFLINE"]),
        ({"teacher_model_name_or_path": "./gone"}, {"teacher": None}, ["'./gone'", "neither a folder with a model"]),
        ({}, {"teacher": None}, ["no teacher", "teacher_model_name_or_path", "kd_weight=0"]),
        ({"teacher_load_in_4bit": True}, {}, ["load_in_4bit", "from a name"]),
        ({"teacher_model_revision": "v1"}, {}, ["revision", "from a name"]),
        (
            {"teacher_model_revision": "v1", "teacher_model_init_kwargs": {"revision": "v2"}},
            {},
            ["teacher_model_revision", "without effect"],
        ),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {}, ["dtype", "from a name"]),
        ({"teacher_model_name_or_path": "no/such"}, {}, ["two teachers", "LiveTeacher", "'no/such'"]),
        ({"teacher_adapters_off": True}, {}, ["teacher_adapters_off", "give no other"]),
        ({"teacher_adapters_off": True}, {"teacher": None}, ["teacher_adapters_off", "peft_config"]),
        ({}, {"compute_loss_func": print}, ["compute_loss_func", "no effect"]),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, {}, ["model_init_kwargs", "no effect"]),
    ],
    ids=str,
)
def test_a_teacher_that_is_missing_or_one_too_many_is_refused(
    build: Build, refused: Refused, options: dict[str, Any], arguments: dict[str, Any], parts: list[str]
) -> None:
    with refused(*parts):
        build(options, **arguments)


def test_other_types_than_the_documented_ones_are_refused(build: Build, refused: Refused, tmp_path: Path) -> None:
    with refused("DistillationConfig", "SFTConfig", error=TypeError):
        build(args=SFTConfig(str(tmp_path / "out"), use_cpu=True, bf16=False))
    with refused("DistillationConfig", "dict", error=TypeError):
        build(args={"output_dir": str(tmp_path / "out")})
    with refused("teacher must be", "Linear", error=TypeError):
        build(teacher=torch.nn.Linear(2, 2))
    with refused("PeftModel", "merge_and_unload", error=TypeError):
        build(teacher=get_peft_model(tiny_llama(2), LoraConfig(target_modules="all-linear")))
    with refused("model must be", "NoneType", error=TypeError):
        build(model=None)


@pytest.mark.parametrize("name", ["no/such-data", "missing.jsonl"])
def test_data_that_does_not_exist_is_named(refused: Refused, name: str) -> None:
    with refused(f"'{name}'", "no file, no folder", "stdlib"):
        load_data(ScriptArguments(dataset_name=name))


def with_two_ids_exchanged(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    exchanged = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=exchanged, eos_token=tokenizer.eos_token)


def trained_on_other_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return train_tokenizer(Dataset.from_dict({"text": [f"Sphinx {i} of black quartz" for i in range(900)]}), VOCAB)


@pytest.mark.parametrize("other", [with_two_ids_exchanged, trained_on_other_text])
def test_vocabularies_of_equal_size_with_other_ids_are_refused_or_aligned(
    build: Build,
    refused: Refused,
    tokenizer: PreTrainedTokenizerBase,
    other: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase],
) -> None:
    teachers = other(tokenizer)
    assert len(teachers) == len(tokenizer)
    with refused(f"{VOCAB} tokens", "different ids", " against ", "sequence-level distillation"):
        build({"teacher_alignment": "none"}, teacher=LiveTeacher(tiny_llama(2), teachers))
    assert build(teacher=LiveTeacher(tiny_llama(2), teachers)).is_aligned  # and never compared id by id


def test_a_matrix_smaller_than_the_vocabulary_is_refused(
    build: Build, refused: Refused, tokenizer: PreTrainedTokenizerBase
) -> None:
    with refused("300 logits", f"{VOCAB} tokens", "resize_token_embeddings"):
        build(teacher=LiveTeacher(tiny_llama(2, vocab_size=300), tokenizer))
    with refused("300 logits", f"{VOCAB} tokens", "resize_token_embeddings"):
        build(model=tiny_llama(1, hidden=16, vocab_size=300))


def test_matrices_padded_to_other_sizes_work_and_their_padding_has_no_mass(
    build: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    histories = []
    for weight in (0.0, 1e3):
        teacher = tiny_llama(2, vocab_size=VOCAB + 32)
        with torch.no_grad():
            teacher.lm_head.weight[VOCAB:] = weight
        trainer = build(teacher=LiveTeacher(teacher, tokenizer))
        trainer.train()
        histories.append(logged(trainer, "kl"))
    assert histories[0] == histories[1]
    assert all(0 < kl < 100 for kl in histories[0])


def broken_at(token: str | None, tokenizer: PreTrainedTokenizerBase) -> LiveTeacher:
    """A teacher that gives NaN: always, or from the first `token` of a sequence on."""
    model = tiny_llama(2)
    weight = model.model.norm.weight if token is None else model.model.embed_tokens.weight
    with torch.no_grad():
        weight[... if token is None else tokenizer.convert_tokens_to_ids(token)] = torch.nan
    return LiveTeacher(model, tokenizer)


@pytest.mark.parametrize(("token", "sequence"), [(None, 0), ("Ã", 1)])
def test_a_teacher_that_gives_nan_is_caught_before_anything_is_learned_from_it(
    build: Build, refused: Refused, tokenizer: PreTrainedTokenizerBase, token: str | None, sequence: int
) -> None:
    trainer = build(teacher=broken_at(token, tokenizer))
    before = copied_state(trainer.model)
    with refused("NaN", "after step 0", f"sequence {sequence}", repr(TEXTS[sequence][:20])[1:-1], "bfloat16"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("options", [{}, {"divergence": "tvd"}, {"kd_weight": 0.0, "ce_weight": 1.0}], ids=str)
def test_a_teacher_that_gives_nan_is_caught_in_evaluation(
    build: Build, refused: Refused, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    data = Dataset.from_dict({"text": TEXTS})
    trainer = build(options, teacher=broken_at("Ã", tokenizer), eval_dataset=data)
    with refused("NaN", "sequence 1", repr(TEXTS[1][:20])[1:-1]):
        trainer.evaluate()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_teacher_whose_head_gives_nan_is_caught_too(
    build: Build, refused: Refused, tokenizer: PreTrainedTokenizerBase, accumulation: int
) -> None:
    model = tiny_llama(2)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    trainer = build({"gradient_accumulation_steps": accumulation}, teacher=LiveTeacher(model, tokenizer))
    before = copied_state(trainer.model)
    with refused("the teacher gave NaN", "after step 0"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert [finding.what for finding in trainer.check().findings if finding.level == "red"] == ["data"]


@pytest.mark.parametrize("options", [{}, {"kd_weight": 0.0, "ce_weight": 1.0}], ids=str)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_logged(
    build: Build, refused: Refused, options: dict[str, Any]
) -> None:
    trainer = build({"learning_rate": 1e30, "max_steps": 9} | options)
    with refused("the student gave NaN or infinity", "after step 1", "learning_rate"):
        trainer.train()
    assert all(entry["loss"] != 0 for entry in trainer.state.log_history if "loss" in entry)

    trainer = build(options)
    original = trainer.model.model.norm.forward
    trainer.model.model.norm.forward = lambda hidden: original(hidden) * torch.inf
    with refused("the student gave NaN or infinity", "after step 0", "sequence 0", repr(TEXTS[0][:20])[1:-1]):
        trainer.train()


def test_gradients_that_are_not_finite_ruin_no_weights(build: Build, refused: Refused) -> None:
    trainer = build()
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = copied_state(trainer.model)
    with refused("the gradients after step 0 are not finite"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_student_of_nan_is_neither_trained_nor_saved(build: Build, refused: Refused) -> None:
    trainer = build()
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = torch.nan
    with refused("lm_head.weight", "NaN"):
        trainer.train()
    with refused("lm_head.weight", "NaN"):
        trainer.save_model()


@pytest.mark.parametrize("packing", [False, True])
def test_data_in_which_nothing_counts_is_refused(build: Build, refused: Refused, packing: bool) -> None:
    masked = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[-100] * 3] * 4})
    with refused("train dataset", "no token to learn from"):
        build({"packing": packing, "dataset_kwargs": {"skip_prepare_dataset": not packing}}, train_dataset=masked)
    cut = Dataset.from_dict({"prompt": [TEXTS[0]] * 4, "completion": [TEXTS[1]] * 4})
    with refused("train dataset", "no token to learn from", "max_length"):
        build({"packing": packing, "max_length": 8}, train_dataset=cut)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("packing", [False, True])
def test_sequences_longer_than_a_models_context_are_refused_and_packs_of_shorter_ones_are_not(
    build: Build, refused: Refused, tokenizer: PreTrainedTokenizerBase, packing: bool, split: str, role: str
) -> None:
    def rows(length: int) -> Dataset:
        return Dataset.from_dict(
            {"input_ids": [list(range(1, length + 1))] * 4, "labels": [list(range(1, length + 1))] * 4}
        )

    def models() -> dict[str, Any]:
        limits = {other: 20 if other == role else 128 for other in ("student", "teacher")}
        teacher = LiveTeacher(tiny_llama(2, max_position_embeddings=limits["teacher"]), tokenizer)
        return {"model": tiny_llama(1, hidden=16, max_position_embeddings=limits["student"]), "teacher": teacher}

    options = {"packing": packing, "max_length": 64}
    data = {"train_dataset": rows(20), "eval_dataset": rows(20)}
    build(options, **models(), **data).train()
    with refused(f"the {split} dataset", "21 tokens", f"the {role}'s context of 20", "max_length=20"):
        build(options, **models(), **(data | {f"{split}_dataset": rows(21)}))


def test_a_folder_with_checkpoints_of_another_run_is_neither_overwritten_nor_gone_on_from(
    build: Build, refused: Refused, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    with refused("no checkpoint in", str(tmp_path / "out")):
        build(saving).train(resume_from_checkpoint=True)
    with refused("no checkpoint at", "elsewhere"):
        build(saving).train(resume_from_checkpoint="elsewhere")
    trainer = build(saving)
    trainer.train()

    longer = saving | {"max_steps": 3}
    with refused("checkpoint-2 is of an earlier run", "resume_from_checkpoint=True", "another output_dir"):
        build(longer).train()
    divergences = "objective.divergence: the checkpoint has 'ForwardKL()', asked for is 'JSD(beta=0.5)'"
    with refused("checkpoint-2", divergences, "another output_dir"):
        build(longer | {"divergence": "jsd"}).train(resume_from_checkpoint=True)
    smaller = LiveTeacher(tiny_llama(2, hidden=16), tokenizer)
    sizes = (trainer.teacher.model.num_parameters(), smaller.model.num_parameters())
    with refused("teacher.parameters: the checkpoint has {}, asked for is {}".format(*sizes)):
        build(longer, teacher=smaller).train(resume_from_checkpoint=True)

    resumed = build(longer)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_finished_student_is_not_overwritten(build: Build, refused: Refused, tmp_path: Path) -> None:
    trainer = build()
    trainer.train()
    trainer.save_model()
    trainer.train()
    trainer.save_model()  # its own
    for write in (build().train, build().save_model):
        with refused("out has the student of an earlier run", "another output_dir"):
            write()
    with refused("out is also the student"):
        build(model=str(tmp_path / "out"))


def test_a_student_that_is_saved_elsewhere_takes_no_others_place(
    build: Build, refused: Refused, tmp_path: Path
) -> None:
    elsewhere, models = str(tmp_path / "elsewhere"), tmp_path / "models"
    trainer = build()
    trainer.save_model(elsewhere)
    trainer.save_model(elsewhere)  # its own
    with refused("elsewhere has the student of another run", "objective.divergence", "another folder"):
        build({"divergence": "jsd"}).save_model(elsewhere)
    tiny_llama(3).save_pretrained(models)
    with refused("models holds a model, model.safetensors"):
        trainer.save_model(str(models))


def test_a_run_that_goes_on_is_the_one_whose_student_is_there(build: Build, refused: Refused, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = build(saving)
    first.train()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "kept")
    shutil.rmtree(tmp_path / "out")
    other = build(saving | {"divergence": "jsd"})
    other.train()
    other.save_model()
    with refused("out is of another distillation", "divergence"):
        build(saving | {"max_steps": 3}).train(resume_from_checkpoint=str(tmp_path / "kept"))


def test_two_runs_do_not_share_a_folder(build: Build, refused: Refused) -> None:
    trainer = build()

    class StartAnother(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with refused("another run is writing into"):
                build().train()

    trainer.add_callback(StartAnother())
    trainer.train()
    build().train()


def test_a_checkpoint_is_there_whole_or_not_at_all(
    build: Build, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "save_total_limit": 2}
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    best |= {"greater_is_better": True}  # the second, as it happens
    trainer = build(options | best | {"learning_rate": 0.1}, eval_dataset=Dataset.from_dict({"text": TEXTS}))
    saved = Trainer._save_rng_state

    def save_or_fail(self: Trainer, folder: str) -> None:
        saved(self, folder)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_rng_state", save_or_fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir() if path.is_dir()}
    assert names == {"checkpoint-2", "checkpoint-3"}
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint == str(out / "checkpoint-2")

    (out / "checkpoint-3" / "trainer_state.json").unlink()
    monkeypatch.undo()
    with refused("checkpoint-3 is not whole", "trainer_state.json is missing"):
        build(options).train(resume_from_checkpoint=str(out / "checkpoint-3"))
    resumed = build(options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-2]["step"] == 4


def test_a_trainer_goes_on_from_its_own_checkpoint(build: Build) -> None:
    trainer = build({"save_strategy": "steps", "save_steps": 1})
    trainer.train()
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_teacher_that_is_the_student_is_refused(build: Build, tokenizer: Any) -> None:
    model = tiny_llama(1)
    with pytest.raises(ValueError, match="share their weights"):
        build(model=model, teacher=LiveTeacher(model, tokenizer), peft_config=LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_stream_longer_than_a_models_context_is_refused(build: Build, tokenizer: Any, role: str) -> None:
    stream = Dataset.from_dict({"text": ["x = 1\n" * 60]}).to_iterable_dataset()
    short = tiny_llama(2, max_position_embeddings=32)
    models = {"teacher": LiveTeacher(short, tokenizer)} if role == "teacher" else {"model": short}
    trainer = build({"max_length": 64}, train_dataset=stream, **models)
    with pytest.raises(ValueError, match=f"longer than the {role}'s context of 32"):
        trainer.train()


def test_a_learned_prompt_takes_its_part_of_the_context(build: Build, refused: Refused) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    ids = list(range(1, 31))
    data = Dataset.from_dict({"input_ids": [ids] * 4, "labels": [ids] * 4})
    with refused("30 tokens", "the student's context of 28"):
        build(model=tiny_llama(1, max_position_embeddings=32), peft_config=prompt, train_dataset=data)


def test_a_pickle_that_would_go_to_the_hub_is_refused(tmp_path: Path) -> None:
    options = {"push_to_hub": True, "hub_token": "hf_secret", "hub_strategy": "every_save"}
    with pytest.raises(ValueError, match=r"hub_strategy=end.*llm-distill push") as caught:
        make_config(tmp_path / "out", **options)
    assert "hf_secret" not in str(caught.value)


def test_a_learned_prompt_with_packing_is_refused(build: Build) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="packing=False"):
        build({"packing": True}, peft_config=prompt)

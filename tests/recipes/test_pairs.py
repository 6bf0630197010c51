"""The recipes for real pairs: each YAML by its command's own parser, against the configurations that the Hub has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from memory import BLOCK, table
from pairs import (
    MODELS,
    PAIRS,
    PARAMETERS,
    RECIPES,
    TOKENS,
    family_of,
    models_of,
    options_of,
    published_config,
    recipe,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llm_distill.cache.methods import make_method
from llm_distill.cli.capture import capture
from llm_distill.cli.generate import generate
from llm_distill.cli.parsing import parse
from llm_distill.cli.train import train
from llm_distill.heads import LMHead
from llm_distill.models import kept_of, vocabulary_size
from llm_distill.rows import View, counted_rows
from llm_distill.teachers import LiveTeacher

KINDS = ("live", "cached", "sequence")
DATA = {pair: options_of(pair, "live")["dataset_name"] for pair in PAIRS}
CONVERSATION = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4, I think."},
]


@pytest.fixture(autouse=True)
def at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the commands are given: the paths of chat templates start there."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def shrunk(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], list[str]]:
    """A recipe as it is, but for its sizes, and for folders where it names what is on the Hub."""

    def arguments(pair: str, kind: str) -> list[str]:
        options = options_of(pair, kind)
        for name, seed, hidden in (("model_name_or_path", 0, 64), ("teacher_model_name_or_path", 1, 128)):
            if (model := options.get(name)) is not None:
                options[name] = str(tmp_path / model)
                own = tiny_tokenizer(model, tokenizer)
                own.save_pretrained(tmp_path / model)
                tiny_model(model, vocabulary_size(own), seed, hidden).save_pretrained(tmp_path / model)
        for split, count in (("train", 12), ("test", 3)):
            rows = [{"messages": CONVERSATION[: 2 + 2 * (i % 2)]} for i in range(count)]
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options["dataset_name"] = str(tmp_path / ("generate" if kind == "sequence" else "data"))
        for name in ("dataset_config", "dataset_train_split", "dataset_test_split"):
            options.pop(name, None)
        options["output_dir"] = str(tmp_path / kind)
        if kind == "generate":
            options |= {"max_new_tokens": 8, "filters": {}}  # a teacher that knows nothing never ends
        else:
            options |= {"max_length": 256, "gradient_accumulation_steps": 2, "use_cpu": True}
            options |= {"max_steps": 2}  # the first has a learning rate of 0
        if kind == "cached":
            options["teacher_cache"] = str(tmp_path / "cache")
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(options))
        return ["--config", str(tmp_path / f"{kind}.yaml")]

    return arguments


def require_trained(folder: Path, start: Path) -> None:
    """Every weight has moved, and the folder is a model as any other."""
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (start, folder))
    for (name, was), (_, now) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert now.isfinite().all(), name
        assert not torch.equal(was, now), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_training_is_what_the_command_takes(pair: str, kind: str) -> None:
    script, args, model, _ = parse("train", ["--config", str(recipe(pair, kind))])
    student, teacher = models_of(pair)
    assert (model.model_name_or_path, model.dtype, args.bf16) == (student, "float32", True)
    assert args.teacher_model_name_or_path == (None if kind == "sequence" else teacher)
    assert script.dataset_name == (options_of(pair, "generate")["output_dir"] if kind == "sequence" else DATA[pair])
    assert (args.kd_weight, args.ce_weight) == ((0, 1) if kind == "sequence" else (1, 0))
    limits = [published_config(name).get_text_config().max_position_embeddings for name in (student, teacher)]
    assert args.max_length <= min(limits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_step_has_as_many_tokens(pair: str, kind: str) -> None:
    options = options_of(pair, kind)
    sequences = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    assert sequences * options["max_length"] == 131_072


@pytest.mark.parametrize("pair", PAIRS)
def test_capturing_is_what_the_command_takes(pair: str) -> None:
    _, args, _, options = parse("capture", ["--config", str(recipe(pair, "cached"))])
    method = make_method(options.cache_method, **options.cache_kwargs)
    assert method.name in (("hybrid",) if args.divergence == "forward_kl" else ("top_k", "hidden"))
    assert "cache_method" in options_of(pair, "cached")


@pytest.mark.parametrize("pair", PAIRS)
def test_generating_is_what_the_command_takes(pair: str) -> None:
    script, config = parse("generate", ["--config", str(recipe(pair, "generate"))])
    assert (config.teacher_model_name_or_path, script.dataset_name) == (models_of(pair)[1], DATA[pair])
    assert config.teacher_load_in_4bit == options_of(pair, "live").get("teacher_load_in_4bit", False)
    assert next(iter(config.make_filters())) == "finished"
    assert config.max_new_tokens < options_of(pair, "sequence")["max_length"]


def test_every_yaml_of_a_pair_has_a_test() -> None:
    assert len(PAIRS) == 5
    for pair in PAIRS:
        assert {path.stem for path in (RECIPES / pair).glob("*.yaml")} == {*KINDS, "generate"}


@pytest.mark.parametrize("model", MODELS)
def test_the_published_configuration_makes_the_model_that_the_hub_counts(model: str) -> None:
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(published_config(model))
    assert whole.num_parameters() == PARAMETERS[model]
    assert whole.get_output_embeddings().out_features >= TOKENS[family_of(model)]


@pytest.mark.parametrize("pair", PAIRS)
def test_student_and_teacher_are_of_one_family_and_the_teacher_is_larger(pair: str) -> None:
    student, teacher = models_of(pair)
    assert family_of(student) == family_of(teacher)
    assert PARAMETERS[student] * 4 < PARAMETERS[teacher]


@pytest.mark.parametrize("model", MODELS)
def test_the_head_gives_the_logits_and_packed_texts_do_not_see_each_other(
    model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = tiny_tokenizer(model, tokenizer)
    tiny = tiny_model(model, vocabulary_size(own))
    head = LMHead.of(tiny, vocabulary_size(own))
    texts = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = counted_rows(texts)
    apart = kept_of(tiny, head, View.of({"input_ids": texts, "labels": texts})).hidden
    with torch.no_grad():
        logits = tiny(input_ids=texts).logits[rows.sample, rows.position]
        torch.testing.assert_close(head(apart), logits[:, : head.vocab_size])
        labels = texts.clone()
        labels[:, 0] = -100  # as packing does it: nothing is predicted across
        packed = {
            "input_ids": texts.view(1, -1),
            "labels": labels.view(1, -1),
            "position_ids": torch.arange(12).repeat(1, 2),
        }
        together = kept_of(tiny, head, View.of(packed)).hidden
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("model", MODELS)
def test_what_the_assistant_says_is_found(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    own = tiny_tokenizer(model, tokenizer)
    pair = next(pair for pair in PAIRS if model in models_of(pair))
    path = options_of(pair, "live").get("chat_template_path")
    template = get_training_chat_template(own) if path is None else Path(path).read_text()
    assert template is not None
    assert has_generation_markers(template)
    said = own.apply_chat_template(
        CONVERSATION, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    taught = [token for token, mask in zip(said["input_ids"], said["assistant_masks"], strict=True) if mask]
    ends = "<end_of_turn>" if "gemma" in model else own.eos_token
    answers = [message["content"] for message in CONVERSATION if message["role"] == "assistant"]
    said_again = own.decode(taught).replace("<think>\n\n</think>\n\n", "").replace("\n", "")
    assert said_again == "".join(f"{answer}{ends}" for answer in answers)


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "chat_template_path" in options_of(pair, "live")])
def test_our_templates_write_what_the_teachers_own_writes(
    pair: str, system: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = tiny_tokenizer(models_of(pair)[1], tokenizer)
    ours = Path(options_of(pair, "live")["chat_template_path"]).read_text()
    messages = [{"role": "system", "content": "Be short."}, *CONVERSATION] if system else CONVERSATION
    for turns, prompt in ((messages, False), (messages[:-1], True)):
        how = {"tokenize": False, "add_generation_prompt": prompt}
        assert own.apply_chat_template(turns, chat_template=ours, **how) == own.apply_chat_template(turns, **how)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_student_learns_from_the_live_teacher(
    pair: str, tmp_path: Path, shrunk: Callable[[str, str], list[str]]
) -> None:
    train(shrunk(pair, "live"))
    figures = json.loads((tmp_path / "live" / "eval_results.json").read_text())
    assert figures["eval_kl"] > 0
    require_trained(tmp_path / "live", tmp_path / models_of(pair)[0])


@pytest.mark.parametrize(
    "pair", ["gemma-3-1b-from-gemma-3-12b", "llama-3.2-1b-from-llama-3.1-8b", "qwen2.5-0.5b-from-qwen2.5-7b"]
)
def test_the_student_learns_from_the_cache(pair: str, tmp_path: Path, shrunk: Callable[[str, str], list[str]]) -> None:
    config = shrunk(pair, "cached")
    capture(config)
    train(config)
    require_trained(tmp_path / "cached", tmp_path / models_of(pair)[0])


@pytest.mark.parametrize("pair", ["gemma-3-1b-from-gemma-3-12b", "llama-3.2-1b-from-llama-3.1-8b"])
def test_the_student_learns_from_what_the_teacher_wrote(
    pair: str, tmp_path: Path, shrunk: Callable[[str, str], list[str]]
) -> None:
    generate(shrunk(pair, "generate"))
    train(shrunk(pair, "sequence"))
    require_trained(tmp_path / "sequence", tmp_path / models_of(pair)[0])
    if "gemma" in pair:  # and from both, as recipes/README.md says
        both = ["--dataset_name", str(tmp_path / "generate"), "--assistant_only_loss", "false", "--eval_strategy", "no"]
        train([*shrunk(pair, "live"), *both])
        require_trained(tmp_path / "live", tmp_path / models_of(pair)[0])


def test_a_teacher_that_reads_pictures_is_asked_for_text_in_four_bits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    name = "google/gemma-3-12b-it"
    own = tiny_tokenizer(name, tokenizer)
    tiny_model(name, vocabulary_size(own), hidden=128).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    packed, whole = (LiveTeacher.load(str(tmp_path), load_in_4bit=bits) for bits in (True, False))
    texts = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = []
    for teacher in (packed, whole):
        teacher.fit_to(own)
        assert type(teacher.model).__name__ == "Gemma3ForConditionalGeneration"
        assert teacher.head.vocab_size == len(own) - 1  # without the placeholder
        hidden.append(teacher.score(View.of({"input_ids": texts, "labels": texts})).hidden)
    assert packed.describe()["bits"] == 4
    assert torch.cosine_similarity(*hidden, dim=-1).mean() > 0.9


def test_a_placeholder_for_pictures_needs_no_row(tokenizer: PreTrainedTokenizerBase) -> None:
    own = tiny_tokenizer("google/gemma-3-1b-it", tokenizer)
    assert own.image_token_id == len(own) - 1 == vocabulary_size(own)
    assert vocabulary_size(tokenizer) == len(tokenizer)
    with pytest.raises(ValueError, match=r"fewer than the 325 tokens"):
        LMHead.of(tiny_model("google/gemma-3-1b-it", vocabulary_size(own) - 1), vocabulary_size(own))


@pytest.mark.slow  # each layer of each model is traced
@pytest.mark.parametrize("pair", PAIRS)
def test_the_readme_says_what_the_yamls_take_of_memory(pair: str) -> None:
    text = (RECIPES / pair / "README.md").read_text()
    said = BLOCK.search(text)
    assert said is not None
    assert said[0] == table(RECIPES / pair, published_config)
    live = next(line for line in said[0].splitlines() if line.startswith("| `live.yaml` | 1 |"))
    (card,) = re.findall(r"^One GPU of (\d+) GB", text, flags=re.MULTILINE)
    assert float(live.split("|")[-2]) * 1.1 < int(card)
    assert re.search(rf"\({pair}\) .* {card} GB \|", (RECIPES / "README.md").read_text())
    names = ("per_device_train_batch_size", "max_length", "activation_checkpointing", "optim")
    cached, sequence = (options_of(pair, kind) for kind in ("cached", "sequence"))  # which are said to take the same
    assert [cached.get(name) for name in names] == [sequence.get(name) for name in names]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_readme_names_every_yaml_and_configurations_that_exist(pair: str) -> None:
    text = (RECIPES / pair / "README.md").read_text()
    commands = {tuple(found) for found in re.findall(r"^llm-distill (\w+) --config (\S+)$", text, flags=re.MULTILINE)}
    wanted = [("train", kind) for kind in KINDS] + [("capture", "cached"), ("generate", "generate")]
    assert commands == {(command, f"recipes/{pair}/{kind}.yaml") for command, kind in wanted}
    launched = re.findall(r"accelerate launch --config_file (\S+) (\S+) \\\n +(.*)", text)
    assert launched
    for accelerate, script, flags in launched:
        load_config_from_file(accelerate)
        assert Path(script).is_file()
        parse("capture" if script.endswith("capture.py") else "train", flags.split())

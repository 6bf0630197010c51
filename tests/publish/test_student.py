"""`llm-distill push`: the real client and a small Hub on 127.0.0.1, in processes of their own as a user has them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import as_flags, write_rows
from hub_server import PERSON, TOKEN, Hub, python, shard_name
from huggingface_hub import ModelCard
from reports import domain, figure, gap_report

from llm_distill.cli.parsing import parse
from llm_distill.publish.student import _stage

REPO = "somebody/student"
TRAIN = """
import json, sys
from llm_distill.cli import main
main(["train", *json.loads(sys.argv[1 + 2])])
"""
PUSH_IN_THE_BACKGROUND = """
import json, sys
from concurrent.futures import Future
from llm_distill.cli.build import build_trainer
from llm_distill.cli.parsing import parse
from llm_distill.publish.student import _stage
trainer = build_trainer(*parse("train", json.loads(sys.argv[1 + 2]))[:3])
trainer.train()
try:
    trainer.hub_model_id = "others/student"
    trainer.push_to_hub(blocking=False)
    sys.exit("it was not refused")
except ValueError as error:
    assert "does not let you write to others/student" in str(error), error
trainer.hub_model_id = "somebody/student"
assert isinstance(trainer.push_to_hub(blocking=False, model_name="A Title"), Future)
"""
PUSH = """
import json, sys
sys.stderr = sys.stdout
from llm_distill.cli import main
for arguments in json.loads(sys.argv[3]):
    print("---")
    try:
        main(["push", *arguments])
    except SystemExit as end:
        print(f"exit {end.code}")
"""
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
names, ids, output, code = sys.argv[3:]
with torch.no_grad():
    for name in json.loads(names):
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        assert AutoTokenizer.from_pretrained(name)("def f(x):").input_ids
        torch.save(model(torch.tensor([json.loads(ids)])).logits, f"{output}/{name.split('/')[-1]}.pt")
exec(code)
assert not any(module.startswith("llm_distill") for module in sys.modules)
"""
Train = Callable[..., Path]
IDS = [5, 17, 250, 31, 8, 100]


@pytest.fixture
def lab(hub: Hub, saved: Path) -> Hub:
    """Student and teacher are on the Hub, with cards."""
    for name in ("student", "teacher"):
        files = {path.name: path.read_bytes() for path in (saved / name).iterdir()}
        hub.files[f"lab/{name}"] = files | {"README.md": b"---\nlicense: apache-2.0\n---\n"}
    hub.large = True
    return hub


def run(hub: Hub, home: Path, program: str, *arguments: str) -> list[str]:
    return python(hub, home, program, *arguments, HF_HUB_DISABLE_XET="1")


@pytest.fixture(scope="module")
def runs_so_far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, by their options: a run takes some seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trained(lab: Hub, home: Path, runs_so_far: Path) -> Train:
    """The folder of a run of two steps, by a person who has everything in their home."""

    def train(program: str = TRAIN, **options: Any) -> Path:
        key = hashlib.sha256(repr((program, options)).encode()).hexdigest()[:8]
        if (runs_so_far / key).is_dir() and not options.keys() & {"output_dir", "push_to_hub"}:
            return shutil.copytree(runs_so_far / key, home / "out")
        defaults = {
            "model_name_or_path": "lab/student",
            "teacher_model_name_or_path": "lab/teacher",
            "dataset_name": write_rows(home / "data.jsonl", "text"),
            "output_dir": home / "out",
            "max_steps": 2,
            "learning_rate": 0.01,
            "bf16": False,
            "report_to": "none",
            "save_steps": 1,
        }
        run(lab, home, program, json.dumps(as_flags(defaults | options)))
        if "output_dir" not in options:
            shutil.copytree(home / "out", runs_so_far / key)
        return home / "out"

    return train


def push(hub: Hub, home: Path, *commands: list[str | Path], **environment: str) -> list[str]:
    """What each `llm-distill push …` says, one after the other."""
    arguments = json.dumps([[str(part) for part in command] for command in commands])
    lines = python(hub, home, PUSH, arguments, **{"HF_HUB_DISABLE_XET": "1"} | environment)
    return [" ".join(output.split()) for output in "\n".join(lines).split("---\n")[1:]]


def logits(hub: Hub, home: Path, *names: str | Path) -> list[torch.Tensor]:
    """Of a process that knows nothing of llm_distill, which runs the code of the card too."""
    (code,) = re.findall(r"```python\n(.*?)```", hub.files[REPO]["README.md"].decode(), re.DOTALL)
    run(hub, home, READ, json.dumps([str(name) for name in names]), json.dumps(IDS), str(home), code)
    return [torch.load(home / f"{Path(name).name}.pt") for name in names]


def write_report(folder: Path) -> Path:
    losses = {"student": 4.8, "teacher": 4.4, "baseline": 5.3}
    likeness = {name: figure(0.3) for name in ("kl", "reverse_kl", "top1_agreement", "acceptance")}
    binned = [{"from": 0, "to": 7, "tokens": 9, "kl": figure(0.3)}]
    both = {"likeness": likeness, "by_position": binned, "by_frequency": binned}
    domains = {
        "code": domain(losses, gap_closed=figure(0.55), **both),
        "prose": domain(losses, gap_closed=figure(0.25), **both),
    }
    report = gap_report(domains, comparable=True, generations={"skipped": "asked for none"})
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.md").write_text("# Gap report\n")
    picture = Path(__file__).parents[2] / "benchmarks" / "demo" / "learning_curves.png"
    shutil.copy(picture, folder / "report_calibration.png")
    shutil.copy(picture, folder / "bank_statement.png")
    return folder / "report.json"


def assert_clean(hub: Hub, home: Path) -> None:
    for name, content in hub.files[REPO].items():
        assert re.fullmatch(r"[\w.-]+\.(safetensors|json|jinja|md|yaml|png|txt)|\.gitattributes", name), name
        for private in (TOKEN, PERSON, str(home.parent)):
            assert private.encode() not in content, f"{private} in {name}"


def test_a_full_student_arrives_whole_and_says_the_same(lab: Hub, home: Path, trained: Train) -> None:
    folder = trained()
    assert (folder / "checkpoint-2" / "optimizer.pt").is_file()
    report = write_report(home / "report")
    (output,) = push(lab, home, [folder, REPO, "--report", report, "--dataset", "lab/code"])
    assert output.endswith(f"Pushed to {lab.url}/{REPO}")
    assert_clean(lab, home)
    expected = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    about = {"README.md", "distillation.json", "run.yaml", "report.json", "report.md", "report_calibration.png"}
    assert lab.files[REPO].keys() == expected | about | {".gitattributes"}
    assert lab.files[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert torch.equal(*logits(lab, home, REPO, folder))

    card = ModelCard(lab.files[REPO]["README.md"].decode())
    assert card.data.base_model == "lab/student"
    assert card.data.base_model_relation == "finetune"
    assert card.data.license == "apache-2.0"
    assert card.data.datasets == ["lab/code"]
    assert {"llm-distill", "knowledge-distillation", "distilled-from:lab/teacher"} <= set(card.data.tags)
    shown = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert shown["prose", "bits_per_byte"] == 4.8 / 3
    assert shown["code", "acceptance"] == 0.3
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert yaml.safe_load(card.data.to_yaml())["model-index"][0]["name"] == "student"
    for text in (
        "from `lab/teacher`",
        "[lab/teacher](https://huggingface.co/lab/teacher)",
        "| code | teacher | 1,234 | 4.4 (3.96 to 4.84) |",
        "![report calibration](report_calibration.png)",
        "[report.md](report.md)",
        "weakest, beside its teacher, on prose: 25% of the gap",
        "Not measured: what it writes, tasks, bias, speed and memory.",
        "model_name_or_path: lab/student\n",
        "dataset_name: data.jsonl\n",
        "llm-distill train --model_name_or_path lab/student --teacher_model_name_or_path lab/teacher --dataset_name",
    ):
        assert text in card.text, text

    before, puts = dict(lab.files[REPO]), dict(lab.puts)
    push(lab, home, [folder / "checkpoint-2", REPO])  # the same run, and it is not sent again
    assert lab.puts == puts
    assert lab.files[REPO]["model.safetensors"] == before["model.safetensors"]
    assert "report.md" not in lab.files[REPO]


def test_code_goes_with_its_model_and_no_other_script(tmp_path: Path) -> None:
    files = {
        "config.json": '{"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "lab/x--theirs.C"}}',
        "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["words.Slow", null]}}',
        "modeling_mine.py": "from .layers import Layer",
        "layers.py": "class Layer: ...",
        "words.py": "class Slow: ...",
        "notes.py": "'mine'",
        "model.safetensors": "",
        "model_of_somebody.safetensors": "",
        "holiday.png": "",
        "report.md": "of no report",
    }
    for folder in ("student", "stage"):
        (tmp_path / folder).mkdir()
    for name, content in files.items():
        (tmp_path / "student" / name).write_text(content)
    _stage(tmp_path / "student", tmp_path / "stage", None, None, merging=False)
    left_out = {"notes.py", "model_of_somebody.safetensors", "holiday.png", "report.md"}
    assert {path.name for path in (tmp_path / "stage").iterdir()} == files.keys() - left_out


def test_the_yaml_in_the_card_is_the_run(lab: Hub, home: Path, trained: Train) -> None:
    folder = trained(divergence="jsd", divergence_kwargs='{"beta": 0.3}', use_peft=True, lora_r=4)
    options = yaml.safe_load((folder / "run.yaml").read_text())
    assert "max_grad_norm" not in options, "a default"
    script, args, model, _ = parse("train", ["--config", str(folder / "run.yaml")])
    assert (args.divergence_kwargs, args.max_steps, model.lora_r) == ({"beta": 0.3}, 2, 4)
    assert (script.dataset_name, args.output_dir) == ("data.jsonl", "out")


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_are_pushed_as_they_are_or_merged(lab: Hub, home: Path, trained: Train, merge: bool) -> None:
    folder = trained(use_peft=True, lora_r=4, lora_target_modules="all-linear")
    flags = ["--merge_adapters"] if merge else []
    (output,) = push(lab, home, [folder, REPO, *flags])
    assert "Pushed to" in output
    assert_clean(lab, home)
    assert ("model.safetensors" in lab.files[REPO]) == merge != ("adapter_model.safetensors" in lab.files[REPO])
    torch.testing.assert_close(*logits(lab, home, REPO, folder), atol=1e-5, rtol=1e-5)
    card = ModelCard(lab.files[REPO]["README.md"].decode())
    assert card.data.base_model_relation == ("finetune" if merge else "adapter")
    push(lab, home, [folder, REPO, *([] if merge else ["--merge_adapters"])])
    names = {name for name in lab.files[REPO] if name.endswith("safetensors") or "config" in name}
    tokenizer, adapters = {"tokenizer_config.json"}, {"adapter_model.safetensors", "adapter_config.json"}
    whole = {"model.safetensors", "config.json", "generation_config.json"}
    assert names == tokenizer | (adapters if merge else whole), "those of the other form are gone"


def test_adapters_on_a_local_model_are_refused_with_the_way_out(
    lab: Hub, home: Path, trained: Train, saved: Path
) -> None:
    shutil.copytree(saved / "student", home / "mine")
    folder = trained(model_name_or_path=home / "mine", use_peft=True, lora_r=4)
    assert not (folder / "README.md").read_text().count(PERSON)
    refused, pushed = push(lab, home, [folder, REPO], [folder, REPO, "--base_model", "lab/student"])
    assert re.search(r"base_model_name_or_path is .*--merge_adapters.*--base_model.*exit 2", refused)
    assert "Pushed to" in pushed
    assert_clean(lab, home)
    torch.testing.assert_close(*logits(lab, home, REPO, folder))


def test_a_broken_connection_goes_on_and_sends_nothing_twice(lab: Hub, home: Path, trained: Train) -> None:
    folder = trained()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    lab.cut = {"README.md"}  # after the weights
    (output,) = push(lab, home, [folder, REPO])
    assert "broke off. What has arrived stays" in output
    assert lab.puts == {shard_name(weights): 1}
    assert not lab.commits
    lab.cut = set()
    push(lab, home, [folder, REPO])
    assert lab.puts == {shard_name(weights): 1}
    assert lab.files[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_other_peoples_work_is_left_alone_without_force(lab: Hub, home: Path, trained: Train) -> None:
    folder = trained()
    lab.files[REPO] = {".gitattributes": b"", "model.safetensors": b"theirs", "pytorch_model.bin": b"theirs"}
    (output,) = push(lab, home, [folder, REPO])
    assert re.search(r"has other things in it, such as model.safetensors.*--force", output)
    record = json.loads((folder / "distillation.json").read_text()) | {"objective.temperature": 2.0}
    lab.files[REPO] = {".gitattributes": b"", "distillation.json": json.dumps(record).encode(), "merges.txt": b""}
    refused, pushed = push(lab, home, [folder, REPO], [folder, REPO, "--force"])
    changes = "objective.temperature: the repository has 2.0, asked for is 1.0"
    assert re.search(f"holds another distilled student: {changes}.*--force", refused)
    assert "Pushed to" in pushed
    assert "merges.txt" not in lab.files[REPO], "of the other's tokenizer"


def test_what_cannot_be_is_said_before_anything_is_sent(lab: Hub, home: Path, trained: Train, saved: Path) -> None:
    folder = trained()
    lab.files["others/student"] = {".gitattributes": b""}
    leaky = shutil.copytree(folder, home / "leaky")
    config = json.loads((leaky / "generation_config.json").read_text())
    (leaky / "generation_config.json").write_text(json.dumps(config | {"note": f"see {home}/notes.txt"}))
    linked = shutil.copytree(folder, home / "linked")
    (home / "id_rsa").write_text("nobody's business")
    (linked / "merges.txt").symlink_to(home / "id_rsa")
    broken = {
        "broken": {"model.safetensors": "x", "distillation.json": "{"},
        "others": {"model.safetensors": "x", "distillation.json": "{}"},
    }
    for name, files in broken.items():
        (home / name).mkdir()
        for file, content in files.items():
            (home / name / file).write_text(content)
    shutil.copytree(folder, home / "yaml")
    (home / "yaml" / "run.yaml").write_text("a: [b")
    (home / "partial.json").write_text(json.dumps({"format": 1, "domains": {"code": {}}}))
    refused: dict[tuple[str | Path, ...], str] = {
        (linked, REPO): "linked/merges.txt is a link to something outside of its folder",
        (home / "others", REPO): "others/distillation.json is not the record of a run: it lacks objective.kd_weight",
        (home / "yaml", REPO): "run.yaml is no YAML",
        (home / "broken", REPO): "broken/distillation.json cannot be read: it is no JSON",
        (folder, REPO, "--report", home / "partial.json"): "partial.json is a gap report without some of its figures",
        (folder, REPO, "--report", folder / "config.json"): "config.json is no gap report",
        (folder, "others/new"): "the Hub does not let you write to others/new",
        (folder, "others/student"): "the Hub does not let you write to others/student",
        (folder, REPO, "--merge_adapters"): "there are no adapters",
        (saved / "student", REPO): "has no distillation.json",
        (home, REPO): "there is no student in",
        (folder, "somebody/a student"): "somebody/a student",
        (folder, REPO, "--merge_adapter"): "Did you mean 'merge_adapters'",
        (folder, REPO, "--report", "none.json"): "there is no report none.json",
        (folder,): "repo_id",
        (leaky, REPO): "generation_config.json, note: the local path",
    }
    outputs = push(lab, home, *(list(arguments) for arguments in refused))
    for output, expected in zip(outputs, refused.values(), strict=True):
        assert expected in output
        assert output.endswith("exit 2")
        assert "Traceback" not in output
    assert not lab.commits
    assert REPO not in lab.files


def test_a_push_may_go_on_in_the_background_under_a_title_of_its_own(lab: Hub, home: Path, trained: Train) -> None:
    """What can be refused is refused at once; the process that only starts the upload does not end before it."""
    trained(PUSH_IN_THE_BACKGROUND, hub_model_id=REPO)
    assert "\n# A Title\n" in lab.files[REPO]["README.md"].decode()
    assert "model.safetensors" in lab.files[REPO]
    assert_clean(lab, home)


def test_without_a_network_all_work_stays(lab: Hub, home: Path, trained: Train) -> None:
    folder = trained()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (output,) = push(lab, home, [folder, REPO], HF_HUB_OFFLINE="1")
    assert re.search("HF_HUB_OFFLINE is set.*exit 2", output)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_training_pushes_and_refuses_early(lab: Hub, home: Path, trained: Train) -> None:
    hub_id = {"push_to_hub": True, "hub_model_id": REPO}
    trained(**hub_id)
    assert len(lab.commits) == 1
    assert_clean(lab, home)
    with pytest.raises(AssertionError, match=r"holds another distilled student: objective.divergence"):
        trained(**hub_id, divergence="reverse_kl", output_dir=home / "other")
    assert not list((home / "other").rglob("*.safetensors"))
    with pytest.raises(AssertionError, match="does not let you write to others/student"):
        trained(push_to_hub=True, hub_model_id="others/student", output_dir=home / "third")


def test_a_card_that_somebody_has_made_their_own_stays(lab: Hub, home: Path, trained: Train) -> None:
    folder = trained()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    push(lab, home, [folder, REPO])
    assert lab.files[REPO]["README.md"].endswith(b"Mine.\n")

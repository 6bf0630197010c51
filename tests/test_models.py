"""Who a model is: known by its weights, wherever they lie and whatever they are called."""

from __future__ import annotations

import shutil
from pathlib import Path

from tiny import tiny_llama

from llm_distill.models import describe_checkpoint, files_hash, without_places


def test_the_files_of_a_model_are_known_however_they_are_called_and_cut(tmp_path: Path) -> None:
    model = tiny_llama(1)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "one", snapshot)
    tiny_llama(2).save_pretrained(tmp_path / "other")
    one, many, copied, other = (
        files_hash(str(folder / "config.json"))["files"]
        for folder in (tmp_path / "one", tmp_path / "many", snapshot, tmp_path / "other")
    )
    assert one == many == copied != other


def test_equal_weights_under_other_names_are_the_same_model(tmp_path: Path) -> None:
    tiny_llama(1).save_pretrained(tmp_path / "one")
    folder = describe_checkpoint(str(tmp_path / "one"))
    hub = folder | {"model": "org/one", "revision": "0" * 40}
    stored, wanted = without_places(
        {"ensemble": [hub, hub], "weights": [1]}, {"ensemble": [folder, hub], "weights": [1]}
    )
    assert stored == wanted
    stored, wanted = without_places(hub | {"weights": "a"}, folder)
    assert stored == wanted  # what is in memory is known of one alone
    for other in ({"files": "of others"}, {"dtype": "float16"}):
        stored, wanted = without_places(hub, folder | other)
        assert stored != wanted
    unknown = {name: value for name, value in folder.items() if name != "files"}
    stored, wanted = without_places(hub, unknown)
    assert (stored["model"], wanted["model"]) == ("org/one", "one")

"""`LMHead` against the logits of the model itself, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import ORDINARY, POST_PROCESSED, PRE_PROCESSED, tiny_model
from tiny import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_distill.heads import LMHead
from llm_distill.models import kept_of
from llm_distill.rows import View, counted_rows

FAMILIES = [*POST_PROCESSED, *PRE_PROCESSED, *ORDINARY]


def logits_both_ways(model: PreTrainedModel, head: LMHead) -> tuple[Tensor, Tensor]:
    """Our head on the hidden states, and what the model says, at every position but the last."""
    ids = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    rows = counted_rows(ids)
    with torch.no_grad():
        hidden = kept_of(model, head, View.of({"input_ids": ids, "labels": ids})).hidden
        return head(hidden), model(input_ids=ids).logits[rows.sample, rows.position]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_reproduces_the_logits_of_the_family(family: str) -> None:
    overrides = {**POST_PROCESSED, **PRE_PROCESSED}.get(family, {})
    model = tiny_model(family, **overrides)
    ours, theirs = logits_both_ways(model, LMHead.of(model))
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", POST_PROCESSED)
def test_the_post_processing_is_seen(family: str) -> None:
    head = LMHead.of(tiny_model(family, **POST_PROCESSED[family]))
    assert head.scale != 1.0 or head.soft_cap is not None


def test_the_head_of_an_offloaded_model_is_that_of_the_whole_one(tmp_path: Path) -> None:
    tiny_llama(1).save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map | {"lm_head": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.lm_head.weight.is_meta
    torch.testing.assert_close(*logits_both_ways(offloaded, LMHead.of(offloaded)))
    torch.testing.assert_close(
        logits_both_ways(offloaded, LMHead.of(offloaded))[0], logits_both_ways(whole, LMHead.of(whole))[0]
    )

"""Log-likelihoods of given tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import VOCAB, tiny_llama
from transformers import PreTrainedModel

from llm_distill.heads import LMHead
from llm_distill.losses.likelihoods import token_log_likelihoods

SEQUENCES = [[5, 9, 7, 11, 2], [3], [8, 8, 1]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(5).eval()


@pytest.mark.parametrize("contexts", [None, [3, 1, 3], [0, 0, 2]])
def test_each_token_gets_what_full_logits_in_float64_say(model: PreTrainedModel, contexts: list[int] | None) -> None:
    figures = token_log_likelihoods(model, LMHead.of(model, VOCAB), SEQUENCES, contexts)
    exact = copy.deepcopy(model).double()
    for ids, context, ours in zip(SEQUENCES, contexts or [1, 1, 1], figures, strict=True):
        start = max(context, 1)
        with torch.no_grad():
            log_q = exact(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        naive = log_q.gather(-1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[start - 1 :, 0]
        torch.testing.assert_close(ours, naive, atol=2e-5, rtol=1e-5)


def test_sequences_with_nothing_to_score_give_empty_rows(model: PreTrainedModel) -> None:
    assert [len(row) for row in token_log_likelihoods(model, LMHead.of(model, VOCAB), SEQUENCES[1:], [1, 3])] == [0, 0]

"""Which layers of the student are like which of the teacher: linear CKA (Kornblith et al., 2019, arXiv:1905.00414).

What two layers have in common is how like each other they find the same tokens, whatever their widths, and however the
one is rotated against the other. 1 is the same up to rotation and scale, 0 nothing in common. The sums are those
without bias (Song et al., 2012), as a few tokens in a wide layer would look alike otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from llm_distill.evaluation.compare import TEACHER, HeldOutTexts
from llm_distill.heads import LMHead
from llm_distill.models import HEAD, decoder_layers, kept_of
from llm_distill.ranks import ranks
from llm_distill.rows import View
from llm_distill.tables import Table

TOKENS, TEXTS = 1024, 64
"""How many are looked at, of how many texts, all domains together."""


def linear_cka(
    first: Sequence[Float[Tensor, "rows _"]], second: Sequence[Float[Tensor, "rows _"]]
) -> Float[Tensor, "first second"]:
    """Of each layer of the one with each of the other, at the same tokens: at least four."""
    grams, others = ([_gram(states) for states in layers] for layers in (first, second))
    own, of_others = ([_hsic(gram, gram) for gram in each] for each in (grams, others))
    values = [
        [float(_hsic(a, b) / (x * y).sqrt()) for b, y in zip(others, of_others, strict=True)]
        for a, x in zip(grams, own, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _gram(states: Float[Tensor, "rows width"]) -> Float[Tensor, "rows rows"]:
    """How like each other a layer finds the tokens, without each one's likeness to itself. A constant that is in all
    states, and the scale, change nothing, and are taken off for the sake of rounding.
    """
    states = states.float()
    states = states - states.mean(0)
    states = states / states.norm().clamp(min=1e-30)
    return (states @ states.T).fill_diagonal_(0)


def _hsic(a: Float[Tensor, "rows rows"], b: Float[Tensor, "rows rows"]) -> Float[Tensor, ""]:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion, of two Gram matrices without diagonals."""
    n = len(a)
    a_rows, b_rows = a.sum(0, dtype=torch.float64), b.sum(0, dtype=torch.float64)
    both = a_rows.sum() * b_rows.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a_rows @ b_rows)
    return ((a * b).sum(dtype=torch.float64) + both) / (n * (n - 3))


@torch.no_grad()
def compare_layers(models: Mapping[str, Any], texts: Sequence[HeldOutTexts]) -> dict[str, Any]:
    """`cka` of each of the student's layers [student's][teacher's], on how many `tokens`.

    Args:
        models: `student` and `teacher`, each a `LanguageModel`, with the same tokens.
        texts: of each domain, in them.
    """
    states: dict[str, list[list[Tensor]]] = {name: [] for name in ("student", TEACHER)}
    for of_domain in texts:
        for view in tqdm(_few_views(of_domain, len(texts)), desc="Comparing layers", leave=False):
            for name, batches in states.items():
                model = models[name].model
                batches.append(_layers_at(model.to(ranks().device), models[name].head, view.to(ranks().device)))
    layers = {
        name: [torch.cat(of_layer) for of_layer in zip(*batches, strict=True)] for name, batches in states.items()
    }
    tokens = len(layers["student"][0])
    if tokens < 4:
        raise ValueError(f"the texts have {tokens} tokens that count, and four are needed to compare layers.")
    return {"cka": linear_cka(layers["student"], layers[TEACHER]).tolist(), "tokens": tokens}


def _few_views(texts: HeldOutTexts, domains: int) -> list[View]:
    """Of some texts, and in them of some tokens, from all over them."""
    few = min(len(texts.dataset), max(1, TEXTS // domains))
    places = np.linspace(0, len(texts.dataset) - 1, few).astype(int).tolist()
    views = []
    for start in range(0, few, texts.batch_size):
        indices = places[start : start + texts.batch_size]
        view = View.of(texts.collate([texts.dataset[i] for i in indices]))
        rows, wanted = len(view.positions.targets), -(-TOKENS * len(indices) // (domains * few))
        chosen = torch.linspace(0, rows - 1, min(rows, wanted)).long()
        views.append(view._replace(positions=view.positions.select(chosen)))
    return views


def _layers_at(model: nn.Module, head: LMHead, view: View) -> list[Tensor]:
    numbers = tuple(range(1, len(decoder_layers(model)) + 1))
    kept = kept_of(model, head, view, {**HEAD, "hidden": numbers})
    return [kept.layers["hidden"][number].cpu() for number in numbers]


def layers_parts(measured: dict[str, Any]) -> list[Table | str]:
    """Of each of the student's layers, the teacher's that is most like it."""
    rows = []
    for number, values in enumerate(measured["cka"], 1):
        most = int(np.argmax(values))
        rows.append([f"{number}", f"{most + 1}", f"{values[most]:.2f}"])
    header = ["student's layer", f"most alike, of the teacher's {len(measured['cka'][0])}", "CKA"]
    return [
        Table(header, rows),
        f"Linear CKA at {measured['tokens']:,} tokens: 1 is the same up to rotation and scale.",
    ]

"""Whether what was exported says the same next tokens as the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = (
    "The quick brown fox jumps over the lazy dog.  It was 1984, and 12345 of them didn't care.",
    "def f(x: list[int]) -> str:\n    return ', '.join(f'{i:>4}' for i in x if i % 2 == 0)\n\n\n",
    "Ein naïver Größenvergleich: 3,14 € ≈ 3.50 $; 日本語のテキスト, Ελληνικά, и русский текст 🙂",
    " \t leading and trailing spaces   \r\n\r\n",
)
EXACT, ROUNDED = 1e-3, 0.1
"""By how many standard deviations of the student's logits its own choice may be above the one of the export: where
weights are the same, and where they were rounded to another format. Wrong exports are wrong by more than one.
"""


@torch.no_grad()
def require_same_next_tokens(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    logits: Callable[[Tensor], Tensor],
    what: str,
    *,
    tolerance: float,
) -> float:
    """The share of positions at which both find the same token likeliest; at the others they must be all but equal.

    Args:
        student: in float32 and evaluation mode.
        tokenizer: the student's.
        logits: of the export, [1, time, vocabulary] for ids of [1, time].
        what: names the export.
        tolerance: EXACT or ROUNDED.

    Raises:
        ValueError: it says something else.
    """
    same, all_rows = 0, 0
    for ids in _samples(student, tokenizer):
        expected = student(ids).logits[0].float()
        exported = logits(ids)[0, :, : expected.shape[-1]].float()
        best, chosen = expected.argmax(-1), exported.argmax(-1)
        regret = (expected.amax(-1) - expected.gather(-1, chosen[:, None])[:, 0]) / expected.std(-1)
        if not (torch.isfinite(exported).all() and (regret <= tolerance).all()):
            position = int(regret.nan_to_num(torch.inf).argmax())
            raise ValueError(
                f"{what} is not the student, so it was not left: after {position + 1} tokens it goes on with "
                f"{tokenizer.decode(chosen[position])!r}, the student with {tokenizer.decode(best[position])!r}. "
                "This is a fault of the export: please report it with the student's config.json."
            )
        same, all_rows = same + int((best == chosen).sum()), all_rows + len(best)
    return same / all_rows


def _samples(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Texts, and tokens in no order: [1, time] each."""
    limit = getattr(student.config, "max_position_embeddings", 512)
    for text in TEXTS:
        yield tokenizer(text, return_tensors="pt").input_ids[:, :limit]
    random = torch.Generator().manual_seed(0)
    yield torch.randint(len(tokenizer), (1, min(200, limit)), generator=random)

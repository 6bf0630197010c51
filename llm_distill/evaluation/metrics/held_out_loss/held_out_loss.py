"""Loss, perplexity and bits per byte of held-out texts: an `evaluate` module."""

from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from llm_distill.evaluation.figures import loss_figures
from llm_distill.evaluation.metrics import scores_of

DESCRIPTION = """The mean cross-entropy of the tokens of held-out texts (nats), its exponential, and the bits a
byte, which compare across tokenizers; each with its 95 % bootstrap interval over texts."""
INPUTS = """
Args:
    ce: for each text, the cross-entropy of each of its tokens, in nats.
    num_bytes: for each text, the UTF-8 bytes of those tokens.
Returns:
    loss, perplexity, bits_per_byte: each {"value", "low", "high"}.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class HeldOutLoss(evaluate.Measurement):
    def _info(self) -> evaluate.MeasurementInfo:
        features = Features({"ce": Sequence(Value("float32")), "num_bytes": Value("int64")})
        return evaluate.MeasurementInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features
        )

    def _compute(self, ce: Any, num_bytes: Any) -> dict[str, Any]:
        return loss_figures(scores_of(num_bytes=np.asarray(num_bytes), ce=ce))

"""How far a model's confidence is from its accuracy: an `evaluate` module."""

from typing import Any

import evaluate
from datasets import Features, Sequence, Value

from llm_distill.evaluation.figures import calibration_figures
from llm_distill.evaluation.metrics import scores_of

DESCRIPTION = """The expected calibration error of a model's likeliest tokens over 15 bins of confidence
(arXiv:1706.04599) and their accuracy, each with its 95 % bootstrap interval over texts."""
INPUTS = """
Args:
    confidence: for each text, the largest probability at each of its tokens.
    correct: for each text, 1 where the likeliest token came next and 0 elsewhere.
Returns:
    ece, accuracy: each {"value", "low", "high"}; bins: tokens, confidence and accuracy of each bin that is not empty.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Calibration(evaluate.Measurement):
    def _info(self) -> evaluate.MeasurementInfo:
        features = Features({name: Sequence(Value("float32")) for name in ("confidence", "correct")})
        return evaluate.MeasurementInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features
        )

    def _compute(self, confidence: Any, correct: Any) -> dict[str, Any]:
        return calibration_figures(scores_of(confidence=confidence, correct=correct))

"""How a student's distributions are beside its teacher's: an `evaluate` module."""

from typing import Any

import evaluate
from datasets import Features, Sequence, Value

from llm_distill.evaluation.compare import BESIDE_THE_TEACHER
from llm_distill.evaluation.figures import likeness_figures
from llm_distill.evaluation.metrics import scores_of

DESCRIPTION = """Means over the tokens of held-out texts of KL(teacher‖student) and KL(student‖teacher) (nats), of
whether the likeliest token is the same, and of Σ min(p, q), the share of the student's tokens that speculative decoding
would accept (arXiv:2211.17192); each with its 95 % bootstrap interval over texts."""
INPUTS = """
Args:
    kl, reverse_kl, top1_agreement, acceptance: for each text, the figure of each of its tokens.
Returns:
    the same names, each {"value", "low", "high"}.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class TeacherLikeness(evaluate.Measurement):
    def _info(self) -> evaluate.MeasurementInfo:
        features = Features({name: Sequence(Value("float32")) for name in BESIDE_THE_TEACHER})
        return evaluate.MeasurementInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features
        )

    def _compute(self, **columns: Any) -> dict[str, Any]:
        return likeness_figures(scores_of(**columns))

"""ONNX, by the exporter of transformers: one graph that reads any number of tokens after any number of earlier ones."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_distill.loading import load_tokenizer
from llm_distill.publish.adapters import load_merged
from llm_distill.publish.verify import EXACT, require_same_next_tokens

FILE = "model.onnx"
LATER = "input.past_key_values"
"""How the exporter calls what was read earlier; what it returns begins with `output.`, in the same order."""


def export_onnx(folder: str | Path, output: str | Path) -> float:
    """Writes a student, adapters merged, in float32, with its tokenizer, and verifies it with ONNX Runtime.

    Args:
        folder: of a student.
        output: a folder, for `model.onnx`, its weights, its settings and the tokenizer.

    Returns:
        The share of positions at which its next token is the student's: 1, but for ties.

    Raises:
        ValueError: no student there, a family that the exporter cannot trace, or a graph that is not the student.
        ImportError: onnxscript or onnxruntime is not installed.
    """
    import onnxruntime
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: name a folder that is new or empty.")
    student, tokenizer = load_merged(folder, dtype=torch.float32), load_tokenizer(str(folder))
    ids = torch.arange(16).reshape(2, 8) % student.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # a mask without padding would not become part of the graph
    try:
        # on nothing earlier it reads a prompt, so it is all of the model
        stages = decompose_for_generation(student, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)
        exported = OnnxExporter().export(*stages["decode"], config=OnnxConfig(dynamic=True))
    except Exception as error:  # of torch.export, of onnxscript, of a model's own code: they have no base in common
        raise ValueError(
            f"transformers cannot trace students of the family {student.config.model_type} for ONNX. ({error})"
        ) from error
    ClearMetadataAndDocStringPass()(exported.program)  # the traces of the code, with this machine's paths
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".onnx-") as temporary:
        whole = Path(temporary, "whole")
        exported.save_pretrained(whole)
        student.generation_config.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        session = onnxruntime.InferenceSession(whole / FILE, providers=["CPUExecutionProvider"])
        share = require_same_next_tokens(
            student,
            tokenizer,
            lambda ids: _logits(session, student, ids),
            f"the ONNX graph of {folder}",
            tolerance=EXACT,
        )
        for path in whole.iterdir():
            path.chmod(0o644)
        if output.is_dir():
            output.rmdir()  # it is empty
        whole.rename(output)
    return share


def _logits(session: Any, student: PreTrainedModel, ids: Tensor) -> Tensor:
    """As in generation: half of the tokens as a prompt, the others one by one. [1, time, vocabulary]"""
    inputs = {node.name: node.shape for node in session.get_inputs()}
    heads = {name: shape for name, shape in inputs.items() if name.startswith(LATER)}
    earlier = {name: torch.zeros(1, int(shape[1]), 0, int(shape[3])).numpy() for name, shape in heads.items()}
    places = torch.arange(ids.shape[1])[None]
    prompt = max(1, ids.shape[1] // 2)
    logits = []
    for start, end in [(0, prompt), *((place, place + 1) for place in range(prompt, ids.shape[1]))]:
        given = {
            "input_ids": ids[:, start:end],
            "position_ids": places[:, start:end],
            "attention_mask": torch.ones(1, end, dtype=torch.int64),
        }
        tokens = {name: values.numpy() for name, values in given.items() if name in inputs}
        scores, *later = session.run(None, tokens | earlier)
        logits.append(torch.from_numpy(scores))
        earlier = dict(zip(earlier, later, strict=True))
    return torch.cat(logits, 1)

"""`llm-distill export`."""

from __future__ import annotations

from collections.abc import Sequence

from llm_distill.cli.parsing import Parser, errors_in_one_line

DESCRIPTION = """Writes a student in another program's format, adapters merged and with its tokenizer, reads it back and
compares its next tokens with the student's. What differs is not left.

    gguf  for llama.cpp, Ollama, LM Studio: Llama, Qwen 2 and Qwen 3, in float32, float16 or bfloat16
    onnx  for ONNX Runtime: every family that transformers can trace, in float32"""
EXAMPLE = "llm-distill export runs/student --format gguf --dtype float16 --output runs/student.gguf"


@errors_in_one_line
def export(argv: Sequence[str]) -> None:
    """Writes a student as GGUF or ONNX: `llm-distill export`."""
    parser = Parser("export", DESCRIPTION, EXAMPLE)
    parser.add_argument("folder", help="The student is in this folder, which is that of a run or of a checkpoint.")
    parser.add_argument("--format", choices=("gguf", "onnx"), required=True, help="The student is written like this.")
    parser.add_argument("--output", required=True, help="It is written to this file (gguf) or folder (onnx).")
    parser.add_argument(
        "--dtype", help="The weights of gguf are auto (as they are; the default), float32, float16 or bfloat16."
    )
    options = parser.parse(argv)
    try:
        if options.format == "gguf":
            from llm_distill.publish.gguf import export_gguf

            share = export_gguf(options.folder, options.output, options.dtype or "auto")
        elif options.dtype is not None:
            raise ValueError("without effect here, so refused: dtype (onnx is written in float32).")
        else:
            from llm_distill.publish.onnx import export_onnx

            share = export_onnx(options.folder, options.output)
    except ImportError as error:
        raise ValueError(f"{error}. Exports need `pip install 'llm-distill[export]'`.") from error
    print(f"{options.output} says the same next tokens as the student, at {share:.1%} of the positions tested.")

"""A causal LM behind vLLM's protocol, as far as a teacher needs it, in a process of its own.

`protocol_server.py PORT KEY MAX_LOGPROBS FOLDER…` serves each folder under its last name. The answers have the form and
the messages of vLLM 0.32; the models are real. tests/served has vLLM itself.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Refused(Exception):  # noqa: N818
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


@torch.no_grad()
def prompt_logprobs(model: Any, tokenizer: Any, ids: list[int], k: int) -> list[dict[str, Any] | None]:
    """For each token but the first: itself with its rank, and the k likeliest in its place."""
    log_p = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    said: list[dict[str, Any] | None] = [None]
    for place, token in enumerate(ids[1:]):
        row = log_p[place]
        top = row.topk(k)
        cells = {token: (float(row[token]), int((row >= row[token]).sum()))}
        cells |= {i: (p, n) for n, (i, p) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True), 1)}
        said.append(
            {str(i): {"logprob": p, "rank": n, "decoded_token": tokenizer.decode([i])} for i, (p, n) in cells.items()}
        )
    return said


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    models: dict[str, tuple[Any, Any]]
    key: str
    max_logprobs: int

    def do_GET(self) -> None:
        self._answer(
            lambda _: {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "max_model_len": model.config.max_position_embeddings}
                    for name, (model, _) in self.models.items()
                ],
            }
        )

    def do_POST(self) -> None:
        answers = {
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._write,
            "/detokenize": self._detokenize,
        }
        self._answer(answers[self.path])

    def _write(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Text, greedily: one completion, whatever `n` says, as some servers do."""
        model, tokenizer = self._model(asked)
        chat = "messages" in asked
        text = "".join(message["content"] for message in asked["messages"]) if chat else asked["prompt"]
        ids = tokenizer(text)["input_ids"]
        if len(ids) + asked["max_tokens"] > model.config.max_position_embeddings:
            raise Refused(400, "This model's maximum context length is exceeded.")
        with torch.no_grad():
            output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=asked["max_tokens"])
        new = output[0, len(ids) :].tolist()
        ends = model.generation_config.eos_token_id
        ended = new[-1] in (ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
        written = tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)
        choice = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= {"message": {"role": "assistant", "content": written}} if chat else {"text": written}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new), "total_tokens": len(ids) + len(new)}
        kind = "chat.completion" if chat else "text_completion"
        return {"id": "1", "created": 0, "object": kind, "model": asked["model"], "choices": [choice], "usage": usage}

    def _complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" not in asked:
            return self._write(asked)
        model, tokenizer = self._model(asked)
        ids, k = asked["prompt"], asked["prompt_logprobs"]
        if k > self.max_logprobs:
            raise Refused(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        if len(ids) >= model.config.max_position_embeddings or asked["max_tokens"] < 1:
            raise Refused(400, "max_tokens must be at least 1, got 0.")
        choice = {"index": 0, "text": "", "prompt_logprobs": prompt_logprobs(model, tokenizer, ids, k)}
        return {"object": "text_completion", "model": asked["model"], "choices": [choice]}

    def _detokenize(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": self._model(asked)[1].decode(asked["tokens"])}

    def _model(self, asked: dict[str, Any]) -> tuple[Any, Any]:
        if asked["model"] not in self.models:
            raise Refused(404, f"The model `{asked['model']}` does not exist.")
        return self.models[asked["model"]]

    def _answer(self, make: Any) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            given = self.headers.get("Authorization")
            if self.key and given != f"Bearer {self.key}":
                raise Refused(401, f"Unauthorized: {given}")
            status, answer = 200, make(json.loads(body or "{}"))
        except Refused as refusal:
            status, answer = refusal.status, {"error": {"message": refusal.message, "code": refusal.status}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def main() -> None:
    torch.set_num_threads(1)
    port, Handler.key, Handler.max_logprobs = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    Handler.models = {
        Path(folder).name: (AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
        for folder in sys.argv[4:]
    }
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()

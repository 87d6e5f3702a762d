"""vLLM's protocol over a real socket: models, adapters that come and go, chat, and a prompt's log probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

PROMPT, DRAWN = [5, 3, 8], [4, 9, 2]


def logprob(token: int, shift: float) -> float:
    """What a model gives a token; ``shift`` is what its adapter learned."""
    return -(token % 7 + 1) / 10 - shift


def adapter(directory: Path, base_sha256: str, *, shift: float, probe: Any = None) -> Path:
    """An adapter as the trainer saves it, with what it gave the tokens that it drew."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"shift": shift}))
    (directory / "ratchet.json").write_text(json.dumps({"adapter_of": base_sha256}))
    drawn = {"prompt_token_ids": PROMPT, "token_ids": DRAWN, "logprobs": [logprob(token, shift) for token in DRAWN]}
    (directory / "probe.json").write_text(json.dumps({"prompts": [drawn]} if probe is None else probe))
    return directory


class FakeVllm:
    """``off``: nats by which it computes something else than the trainer; ``scores``: whether it knows completions."""

    def __init__(self, *, runtime_loading: bool = True) -> None:
        self.adapters: dict[str, str] = {}
        self.off = 0.0
        self.scores = True
        self.prompt_logprobs: Any = None
        self.calls: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        if runtime_loading:
            routes += [
                Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            ]
        self.app = Starlette(routes=routes, exception_handlers={404: _not_found})

    def asked(self, path: str) -> list[Any]:
        return [body for said, body in self.calls if said == path]

    async def _body(self, request: Request) -> Any:
        body = await request.json()
        self.calls.append((request.url.path.removeprefix("/v1/"), body))
        self.keys.append(request.headers.get("authorization"))
        return body

    async def models(self, request: Request) -> Response:
        cards = [{"id": "base", "object": "model", "root": "/models/base", "parent": None, "max_model_len": 2048}]
        cards += [{"id": n, "object": "model", "root": p, "parent": "base"} for n, p in self.adapters.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def load(self, request: Request) -> Response:
        body = await self._body(request)
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want to load ...")
        if not (Path(path) / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await self._body(request))["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        if body["model"] != "base" and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        message = {"role": "assistant", "content": "ok", "tool_calls": []}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"model": body["model"], "system_fingerprint": "vllm-0.32.0-tp1", "choices": [choice]})

    async def completions(self, request: Request) -> Response:
        body = await self._body(request)
        if not self.scores:
            return await _not_found(request, None)
        path = self.adapters.get(body["model"])
        shift = json.loads((Path(path) / "adapter_config.json").read_text())["shift"] if path else 0.0
        listed: list[Any] = [
            {str(token): {"logprob": logprob(token, shift) + self.off, "rank": 1, "decoded_token": "x"}}
            for token in body["prompt"]
        ]
        listed[0] = None
        if self.prompt_logprobs is not None:
            listed = self.prompt_logprobs
        return JSONResponse({"choices": [{"index": 0, "text": ".", "prompt_logprobs": listed}]})


async def _not_found(request: Request, _: Any) -> Response:
    return JSONResponse({"detail": "Not Found"}, 404)


def _error(status: int, message: str) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status
    )

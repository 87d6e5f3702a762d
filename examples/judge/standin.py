"""The stand-in itself: a judge that scores as it is told to, and the misbehaviours that it can be commanded to show."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from examples.judge.reading import Scores, attempts, by_worth
from examples.judge.wire import Connections, Hang, HangUp, Reply, Said, as_json, completion, streamed

Entries = list[dict[str, Any]]
Behave = Callable[[Entries], Said | str]  # what is said in place of these scores; text is a completion's content
CHARACTERS_A_TOKEN = 4


def plain(scores: Entries) -> str:
    return json.dumps({"scores": scores})


def changed(scores: Entries, **change: Any) -> str:
    return plain([{**scores[0], **change}, *scores[1:]])


def _names(scores: Entries) -> str:
    return "id" if "id" in scores[0] else "trajectory_id"


def refused(status: int, **headers: str) -> Behave:
    return lambda scores: as_json({"error": {"message": "no"}}, status, **headers)


def cut_body(scores: Entries) -> Reply:
    whole = completion(plain(scores))
    return Reply(whole.body, cut_at=len(whole.body) // 2)


BEHAVIOURS: Mapping[str, Behave] = {
    "straight": plain,
    "permuted": lambda scores: plain(scores[1:] + scores[:1]),
    "missing id": lambda scores: plain(scores[1:]),
    "extra id": lambda scores: plain([*scores, {**scores[0], _names(scores): "attempt-99"}]),
    "repeated id": lambda scores: plain([*scores, scores[0]]),
    "an id for another": lambda scores: plain([scores[1], *scores[1:]]),
    "score of 7": lambda scores: changed(scores, score=7.0),
    "score below 0": lambda scores: changed(scores, score=-0.01),
    "NaN": lambda scores: changed(scores, score=float("nan")),
    "Infinity": lambda scores: changed(scores, score=float("inf")),
    "score in words": lambda scores: changed(scores, score="0.5"),
    "prose": lambda scores: f"Here you are:\n```json\n{plain(scores)}\n```\nAsk me anything.",
    "cut text": lambda scores: plain(scores)[:-9],
    "cut at the token limit": lambda scores: completion(plain(scores), "length"),
    "cut body": cut_body,
    "no content": lambda scores: completion(None),
    "content filter": lambda scores: completion(None, "content_filter"),
    "no completion": lambda scores: Reply(b"<html>", content_type="text/html"),
    "429": refused(429, **{"Retry-After": "0"}),
    "500": refused(500),
    "hang": lambda scores: Hang(),
    "closed": lambda scores: HangUp(),
    "stream": lambda scores: streamed(plain(scores)),
    "cut stream": lambda scores: Reply(streamed(plain(scores)).body[:-400], content_type="text/event-stream"),
}


@dataclass
class StandIn:
    """A judge: ``worth`` maps a word in an attempt's text to its score, what has none is scored by ``judge``.

    It answers as ``script`` says, one after the other, then as ``always``. With ``stream_only`` it refuses a request
    that does not ask for a stream.
    """

    base_url: str = ""
    worth: dict[str, float] = field(default_factory=dict)
    judge: Scores = by_worth
    script: list[Behave] = field(default_factory=list)
    always: Behave = plain
    stream_only: bool = False
    latency_s: float = 0.0
    keep_bodies: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0

    async def __call__(self, verb: str, path: str, body: dict[str, Any]) -> Said:
        match (verb, path):
            case ("POST", "/v1/chat/completions"):
                return await self._timed(body)
            case ("POST", "/behave"):
                return self._told(body)
            case ("GET", "/v1/models"):
                return as_json({"object": "list", "data": [{"id": "m", "object": "model"}]})
        return as_json({"error": {"message": f"no {path} here"}}, 404)

    async def _timed(self, body: dict[str, Any]) -> Said:
        self.calls += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            return self._completed(body)
        finally:
            self.in_flight -= 1

    def _completed(self, body: dict[str, Any]) -> Said:
        if self.keep_bodies:
            self.bodies.append(body)
        if self.stream_only and not body.get("stream"):
            return as_json({"error": {"message": "this server only supports requests with stream=true"}}, 400)
        said = (self.script.pop(0) if self.script else self.always)(self.scores(body))
        if not isinstance(said, str):
            return said
        asked = sum(len(str(message["content"])) for message in body["messages"])
        usage = (asked // CHARACTERS_A_TOKEN, len(said) // CHARACTERS_A_TOKEN)
        self.tokens += sum(usage)
        return streamed(said, usage) if body.get("stream") else completion(said, usage=usage)

    def scores(self, body: dict[str, Any]) -> Entries:
        shown = attempts(body)
        judged = self.judge(shown)
        names = "id" if any(name.startswith("attempt-") for name in shown) else "trajectory_id"
        return [
            {
                names: name,
                "explanation": f"{name} was weighed",
                "score": next((score for word, score in self.worth.items() if word in text), judged[name]),
            }
            for name, text in shown.items()
        ]

    def _told(self, told: dict[str, Any]) -> Said:
        """Another latency or behaviour from now on; the answer is what was counted since the last time."""
        counted = {"calls": self.calls, "tokens": self.tokens, "most_in_flight": self.most_in_flight}
        self.calls = self.tokens = self.most_in_flight = 0
        self.latency_s = told.get("latency_ms", self.latency_s * 1000) / 1000
        if "always" in told:
            self.always = BEHAVIOURS[told["always"]]
        return as_json(counted)


async def serve(endpoint: StandIn, port: int = 0, ready: Callable[[int], None] = lambda port: None) -> None:
    """Answer on loopback until cancelled; ``ready`` is told the port."""
    server = await asyncio.start_server(Connections(endpoint), "127.0.0.1", port, limit=2**20)
    async with server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()


@contextmanager
def stand_in(**given: Any) -> Iterator[StandIn]:
    """A stand-in in a thread of its own, for tests."""
    endpoint, up, stop = StandIn(**given), threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def ready(port: int) -> None:
        endpoint.base_url = f"http://127.0.0.1:{port}/v1"
        loops.append(asyncio.get_running_loop())
        up.set()

    async def run() -> None:
        serving = asyncio.create_task(serve(endpoint, ready=ready))
        await stop.wait()
        serving.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert up.wait(10), "the stand-in did not start"
    try:
        yield endpoint
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)

"""What a version is asked before an agent sees it: a few prompts, and the trainer's own tokens (``probe.json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from services.deployer.serving.endpoint import Endpoint
from services.deployer.serving.serving import NotYet, Outcome, Verified, Wrong
from services.deployer.verification_domain import compared, fault_of, served
from shared.errors import reason

PROMPTS = ("hello", "What is two and two?", "Answer in one word: is ice cold?")
REPLY_TOKENS = 8
PROBE = "probe.json"
CANNOT = (404, 405, 501)  # no such endpoint

Tokens = Annotated[list[int], Field(min_length=1, max_length=4096)]


class Drawn(BaseModel):
    """A reply that the trainer's own model drew at temperature 1, and what it gave each token, in nats."""

    prompt_token_ids: Tokens
    token_ids: Tokens
    logprobs: list[float]

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if len(self.logprobs) != len(self.token_ids):
            raise ValueError("logprobs must be one a token")
        return self


class Probe(BaseModel):
    prompts: list[Drawn] = Field(min_length=1, max_length=64)


async def replies(endpoint: Endpoint, model: str, *, fingerprint: str | None = None) -> Wrong | NotYet | None:
    """What speaks against the server's replies to the fixed prompts. With a ``fingerprint``, each must carry it."""
    for prompt in PROMPTS:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": REPLY_TOKENS}
        match await reply(endpoint, body):
            case Wrong() | NotYet() as against:
                return against
            case said:
                answers_as = str(said.get("system_fingerprint"))
                if fingerprint is not None and answers_as != fingerprint:
                    return Wrong(f"the endpoint answers as {answers_as[:12]}, wanted {fingerprint[:12]}")
    return None


async def reply(endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any] | Wrong | NotYet:
    """One chat completion that parses."""
    said = await endpoint.ask("chat/completions", body)
    if isinstance(said, NotYet):
        return said
    if said.status != 200:
        return NotYet(f"the endpoint refuses a chat: {said.words}")
    if (fault := fault_of(said.body)) is not None:
        return NotYet(f"the endpoint answered, but {fault}")
    checked: dict[str, Any] = said.body
    return checked


async def agreement(endpoint: Endpoint, model: str, directory: Path, tolerance: float) -> Outcome:
    """Whether the server gives the trainer's tokens the trainer's logprobs; what cannot be compared is said."""
    if tolerance == 0:
        return Verified("log probabilities not compared: RATCHET_LOGPROB_TOLERANCE is 0")
    try:
        probe = Probe.model_validate_json((directory / PROBE).read_bytes())
    except FileNotFoundError:
        return Verified(f"log probabilities not compared: the artifact has no {PROBE}")
    except ValidationError as error:
        return Wrong(f"{PROBE} of the artifact cannot be read: {reason(error)}")
    own: list[float] = []
    theirs: list[float | None] = []
    for drawn in probe.prompts:
        found = await _scored(endpoint, model, drawn)
        if not isinstance(found, list):
            return found
        own += drawn.logprobs
        theirs += found
    result = compared(own, theirs)
    mismatch = result.mean if result.tokens else None
    if (why := result.disagreement(tolerance)) is not None:
        return Wrong(f"the endpoint computes something else than the trainer: {why}", mismatch)
    return Verified(str(result), mismatch)


async def _scored(endpoint: Endpoint, model: str, drawn: Drawn) -> list[float | None] | Outcome:
    """The server's log probabilities of the drawn tokens, one each, from the prompt that they make."""
    tokens = [*drawn.prompt_token_ids, *drawn.token_ids]
    body = {"model": model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    said = await endpoint.ask("completions", body)
    if isinstance(said, NotYet):
        return said
    if said.status in CANNOT:
        return Verified(f"log probabilities not compared: the endpoint scores nothing ({said.words})")
    if said.status != 200:
        return Wrong(f"the endpoint refuses the trainer's own tokens: {said.words}")
    choices = said.body.get("choices") if isinstance(said.body, dict) else None
    listed = choices[0].get("prompt_logprobs") if isinstance(choices, list) and choices else None
    found = served(listed, drawn.prompt_token_ids, drawn.token_ids)
    if found is None:
        return Verified("log probabilities not compared: the endpoint gives no prompt_logprobs")
    return found

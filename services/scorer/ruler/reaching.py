"""Whether the judge's endpoint answers this scorer, with its own key: what doctor is told."""

from __future__ import annotations

from typing import Any, Literal

import httpx

from services.scorer.probes.domain import address
from services.scorer.settings import ScorerSettings

REACH_S = 10.0


async def judge_told(settings: ScorerSettings) -> dict[str, Any]:
    """The judge that runs here; ``fault`` says why its endpoint does not answer, ``verdict`` how bad that is."""
    if settings.judge != "ruler" or not settings.judge_base_url:
        return {"judge": settings.judge, "model": None, "rubric": None, "endpoint": None, "fault": None}
    verdict, fault = await _reached(settings, settings.judge_base_url)
    return {
        "judge": settings.judge,
        "model": settings.judge_model,
        "rubric": settings.judge_rubric,
        "endpoint": address(settings.judge_base_url),
        "verdict": verdict,
        "fault": fault,
    }


async def _reached(settings: ScorerSettings, base_url: str) -> tuple[Literal["ok", "warn", "fail"], str | None]:
    key = settings.judge_api_key.get_secret_value() if settings.judge_api_key else ""
    url = base_url.rstrip("/") + "/models"
    try:
        async with httpx.AsyncClient(timeout=REACH_S) as client:
            answer = await client.get(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return "fail", f"/models did not answer: {error or type(error).__name__}"
    if answer.status_code in (401, 403):
        return "fail", "it refused the key"
    if answer.status_code >= 400:
        return "warn", f"/models answered {answer.status_code}; not every server lists its models"
    return "ok", None

"""Secrets taken out of events before they leave, off the agent's path and in time linear in the text.

What stands in the place of a secret says what kind it was. Structure, ids and times stay as they are: an event keeps
its place in its run, and a number in a field of ids is no card's. This is a net with a mesh, not a proof: give
``Recorder`` a function for what is yours alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic_core import SchemaValidator, core_schema, from_json, to_json

from ratchet_sdk.values import told_apart

Redactor = Callable[[str], str]

# What places an event and a call: never text of an agent's. Elsewhere the same names are ordinary fields.
KEPT = frozenset({"schema", "event_id", "kind", "policy", "trajectory_id", "started_at", "occurred_at"})
KEPT_OF_CALLS = frozenset({"call_id", "base_call_id"})
CALLS = ("call", "llm_calls")

# In the name of what holds a password or the like.
TELLING = (
    *("api_key", "apikey", "api-key", "secret", "passw"),
    *(f"{kind}{joint}token" for kind in ("access", "auth", "refresh") for joint in ("", "_", "-")),
)

# The name of a field of ids: ``id``, ``tool_call_id``, ``order_ids``, ``orderId``.
IDS = re.compile(r"(?:^|[_-])(?:id|Id|ID)s?$|[a-z0-9]I[dD]s?$")

# Each kind: words of which one must be there at all (in lower case: finding a word is far cheaper than an expression),
# and its expression. Formats as their issuers publish them.
KINDS: list[tuple[str, tuple[str, ...], re.Pattern[str]]] = [
    (
        "key",
        (
            *("sk-", "sk_", "rk_", "akia", "asia", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
            *("hf_", "aiza", "ya29.", "xox", "private key"),
        ),
        re.compile(
            r"""(?<![A-Za-z0-9]) (?: sk-(?:ant-|proj-)?[A-Za-z0-9_-]{16,}        # OpenAI, Anthropic and others
                                   | A[KS]IA[0-9A-Z]{16} (?![0-9A-Za-z])          # AWS
                                   | gh[pousr]_[A-Za-z0-9]{36,} | github_pat_\w{22,}
                                   | glpat-[\w-]{20,} | hf_[A-Za-z0-9]{30,}
                                   | AIza[\w-]{35} | ya29\.[\w-]{20,}             # Google
                                   | xox[abeoprs]-[A-Za-z0-9-]{10,}               # Slack
                                   | [sr]k_(?:live|test)_[A-Za-z0-9]{16,} )       # Stripe
              | -----BEGIN\ (?:[A-Z]{1,20}\ ){0,3}PRIVATE\ KEY-----[A-Za-z0-9+/=\s\\]{0,20000}
                (?:-----END\ (?:[A-Z]{1,20}\ ){0,3}PRIVATE\ KEY-----)?""",
            re.VERBOSE,
        ),
    ),
    ("token", ("eyj",), re.compile(r"(?<![\w-])eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]{4,}")),  # a JSON web token
    ("token", ("bearer ", "basic "), re.compile(r"(?i)\b(?:bearer|basic) {1,9}[a-z0-9._~+/=-]{12,}")),
    ("password", ("://",), re.compile(r"(?<=://)[^\s:/@\"']{0,100}+:[^\s/@\"']{1,200}+(?=@)")),  # of an address
    (
        "password",
        TELLING,
        re.compile(
            r"""(?i)\b(?:[a-z0-9]{1,20}[_-]){0,3}
                (?:api[_-]?key|secret(?:[_-](?:access[_-])?key)?|password|passwd|(?:access|auth|refresh)[_-]?token)
                \b["']?\s{0,3}[:=]\s{0,3}(?!\[)["']?[^\s"',;&\[]{6,200}""",
            re.VERBOSE,
        ),
    ),
]
DOMAIN = re.compile(r"@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
TOUCHED_RUNS = 10_000
BEFORE_AT = frozenset("._%+-")
CARD = re.compile(r"\d{4}(?:\d{9,15}+|([ -])(?:\d{4}\1\d{4}\1\d{1,7}|\d{6}\1\d{4,5})(?!\d))")  # as they are printed

# One pass of Rust's regex engine over a text, a tenth of the time of the looks that follow: where it finds nothing,
# they would find nothing either.
_WORDS = "|".join(re.escape(word).replace("\\ ", " ") for _, words, _ in KINDS for word in words)
_BY = [rf"{by}(?:\d{{4}}{by}\d{{4}}{by}\d|\d{{6}}{by}\d{{4}})" for by in (" ", "-")]
_SUSPECT = rf"(?i:{_WORDS})|@|\d{{13}}|\d{{4}}(?:{'|'.join(_BY)})"
_is_suspect = SchemaValidator(core_schema.str_schema(pattern=_SUSPECT)).isinstance_python

AS_DIGITS = bytes(ord("0") if chr(byte).isdigit() and byte < 128 else byte for byte in range(256))
CARD_SHAPES = (b"0" * 13, b"0000 0000", b"0000-0000")


def secrets(text: str) -> str:
    """``text`` with keys, tokens, passwords, e-mail addresses and card numbers replaced by ``[kind]``."""
    if not suspect(text):
        return text
    text = _in_ids(text)
    digits = text.encode("utf-8", "replace").translate(AS_DIGITS)  # far cheaper than a scan by the expression
    if any(shape in digits for shape in CARD_SHAPES):
        text = CARD.sub(_card, text)
    return text


def _in_ids(text: str) -> str:
    """As ``secrets``, but for card numbers: one id in ten of that length passes for one."""
    lower = text.lower()
    for kind, words, expression in KINDS:
        for word in words:
            if word in lower:
                text = expression.sub(f"[{kind}]", text)
                break
    return _without_addresses(text) if "@" in text else text


def suspect(text: str) -> bool:
    """Whether there may be a secret in ``text``. False only where there is none of a known kind."""
    if not _is_suspect(text):
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair: Rust did not look at it
            return True
        return False
    return True


def _without_addresses(text: str) -> str:
    """From each @ with a domain backwards: an expression would try every place where an address could begin."""
    parts, done = [], 0
    for domain in DOMAIN.finditer(text):
        start = at = domain.start()
        while start > max(done, at - 64) and (text[start - 1].isalnum() or text[start - 1] in BEFORE_AT):
            start -= 1
        if start < at:
            parts += [text[done:start], "[email]"]
            done = domain.end()
    return "".join([*parts, text[done:]])


def _card(match: re.Match[str]) -> str:
    """13 to 19 digits whose Luhn sum is divisible by ten; not one digit all along, no part of a number or hash."""
    text, start, end = match.string, match.start(), match.end()
    digits = [int(c) for c in match[0] if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    whole = before not in (".", "-") and not before.isalnum() and not after.isalnum()
    is_card = whole and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
    return "[card]" if is_card else match[0]


class Redaction:
    """One agent's events, in their order, each text in them passed through ``redactor``.

    Names of fields are texts too; ids and times are not. Tokens spell a text out once more, and a prompt's tokens those
    of all calls before it: from the first call of a run in which something was replaced, its calls lose their token ids
    and logprobs, and say so (``tokens_redacted``). Such a run is not trained on token by token.
    """

    def __init__(self, redactor: Redactor | None) -> None:
        self._redactor = redactor
        self._touched: dict[str, None] = {}  # runs with a call in which something was replaced

    def __call__(self, data: bytes) -> bytes:
        """An event's JSON; the very same bytes where nothing changed. Raises whatever the redactor raises."""
        redactor = self._redactor
        if redactor is None:
            return data
        as_written = b"\\u" not in data and b"\\/" not in data  # no other escape stands for what is looked for
        if redactor is secrets and not self._touched and as_written and not suspect(data.decode()):
            return data
        event = from_json(data)
        clean = {
            name: value if name in KEPT else _walk(value, _for(name, value, redactor), name)
            for name, value in event.items()
        }
        calls = [*_calls(clean)]
        if calls != [*_calls(event)]:
            self._remember(event.get("trajectory_id"))
        if event.get("trajectory_id") in self._touched:
            for call in calls:
                _without_tokens(call)
        return data if clean == event else to_json(clean)

    def text(self, text: str) -> str:
        """A text of our own, which may quote an agent's."""
        return text if self._redactor is None else self._redactor(text)

    def _remember(self, trajectory_id: str) -> None:
        self._touched[trajectory_id] = None
        if len(self._touched) > TOUCHED_RUNS:
            del self._touched[next(iter(self._touched))]


def _calls(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for call in [event.get("call"), *(event.get("llm_calls") or [])]:
        if isinstance(call, dict):
            yield call


def _without_tokens(call: dict[str, Any]) -> None:
    gone = [call.pop("prompt_token_ids", None)]
    for choice in (call.get("response"), *(call.get("other_choices") or [])):
        if isinstance(choice, dict):
            gone += [choice.pop(name, None) for name in ("token_ids", "logprobs")]
    if any(tokens is not None for tokens in gone):
        call["tokens_redacted"] = True


def _walk(value: Any, redactor: Redactor, top: str = "") -> Any:
    """``top``: the event's own field that this is."""
    match value:
        case str():
            return redactor(value)
        case dict():
            kept = KEPT_OF_CALLS if top in CALLS else frozenset()
            return told_apart((redactor(k), v if k in kept else _named(k, v, redactor)) for k, v in value.items())
        case list():
            return [_walk(item, redactor, top if top == "llm_calls" else "") for item in value]
        case _:
            return value


def _named(name: str, value: Any, redactor: Redactor) -> Any:
    """A field's value. ``{"password": "..."}`` is one secret in two texts, of which neither shows it alone."""
    clean = _walk(value, _for(name, value, redactor))
    if redactor is secrets and isinstance(value, str) and clean == value and _tells(name):
        together = f"{name}={value}"
        return value if secrets(together) == together else "[password]"
    return clean


def _for(name: str, value: Any, redactor: Redactor) -> Redactor:
    """What looks at the texts of a field: where they are ids, not for card numbers."""
    texts = value if isinstance(value, list) else [value]
    are_ids = redactor is secrets and IDS.search(name) and all(isinstance(text, str) for text in texts)
    return _in_ids if are_ids else redactor


def _tells(name: str) -> bool:
    lower = name.lower()
    return any(word in lower for word in TELLING)

"""Server-sent events: what ends a line, what an event is, and what a chunk must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.event_stream import EventStream, chunk_of


def read(*parts: bytes) -> list[str]:
    events = EventStream()
    return [data for part in parts for data in events.feed(part)] + [*events.end()]


OTHER_LINE_ENDS = "\u2028\x85\x0b\x1c"
texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]) | st.sampled_from(OTHER_LINE_ENDS))


@given(st.lists(st.lists(texts, min_size=1, max_size=3), max_size=4), st.sampled_from(["\n", "\r", "\r\n"]), st.data())
def test_an_event_is_its_data_lines_however_they_arrive(told: list[list[str]], end: str, data: st.DataObject) -> None:
    content = b"".join(
        "".join(f"data:{line}{end}" for line in [f" {lines[0]}", *lines[1:]]).encode() + end.encode() for lines in told
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    joined = ["\n".join([lines[0], *(line.removeprefix(" ") for line in lines[1:])]).strip() for lines in told]
    assert read(*parts) == [one for one in joined if one]


def test_comments_other_fields_and_a_byte_order_mark_are_no_data() -> None:
    content = b'\xef\xbb\xbfdata: {"a":\r\n: ping\r\nevent: message\r\nid: 7\r\ndata: 1}\r\n\r\ndata\r\n\r\ndata:2'
    assert read(content) == ['{"a":\n1}', "2"]


def test_half_a_character_stands_as_it_came() -> None:
    assert chunk_of('{"choices": [{"delta": {"content": "\\ud83d"}}]}')["choices"][0]["delta"]["content"] == "\ud83d"


def test_a_chunk_is_an_object_with_choices_and_null_is_nothing() -> None:
    assert chunk_of('{"id": "c", "choices": null, "error": null}') == {"id": "c", "choices": [], "error": None}
    for data, words in {
        "{": "not JSON",
        "[" * 10_000: "not JSON",
        "[]": "no object",
        '{"error": {"message": "no"}}': "error",
        '{"choices": [null]}': "no list of objects",
        '{"choices": {"a": 1}}': "no list of objects",
    }.items():
        with pytest.raises(ValueError, match=words):
            chunk_of(data)

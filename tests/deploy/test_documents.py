"""The generated papers say what the models say, and their examples are events that would be taken."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from ratchet_sdk.events import step_events
from ratchet_sdk.outcomes import outcomes

from docs import generate


@pytest.mark.parametrize("path", generate.documents(), ids=lambda path: path.name)
def test_generated_documents_are_as_generated(path: generate.Path) -> None:
    assert path.read_text() == generate.documents()[path], f"run `python -m docs.generate`: {path.name} is old"


def test_every_kind_has_an_example_that_is_taken() -> None:
    for adapter, kinds in ((step_events, generate.STEP_KINDS), (outcomes, generate.OUTCOME_KINDS)):
        for model in kinds:
            example = generate.EXAMPLES[str(model.model_fields["kind"].default)]
            assert isinstance(adapter.validate_json(json.dumps(example)), model)


def test_the_schema_asks_for_what_a_publisher_has_to_send() -> None:
    schema = generate.json_schema(generate.events.StepEvent, "Step event")
    assert {"event_id", "kind", "trajectory_id", "started_at"} <= set(schema["$defs"]["Step"]["required"])


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    document = generate.asyncapi()

    def check(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(reference := node.get("$ref"), str):
                found: object = document
                for part in reference.removeprefix("#/").split("/"):
                    assert isinstance(found, dict)
                    assert part in found, reference
                    found = found[part]
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(document)


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((generate.HERE.parent / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {re.split(r"[\[=<>!~ ;]", requirement)[0] for requirement in asked}
    table = (generate.HERE.parent / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2]
    assert {name for name in names - {"ratchet-sdk"} if name not in table} == set()

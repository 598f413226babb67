"""No request, however malformed, gives a 500, and every answer is one the OpenAPI document names.

schemathesis makes requests from each service's document, valid and invalid ones; the nonsense that no schema suggests
stands in `test_rest_nonsense`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.journeys.scene import MISSING_NEIGHBOURS, SERVICES, Scene, document
from tests.stack import Stack

EXAMPLES = 12

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]

# Of methods nobody offers the document cannot speak.
AT_THE_DOOR = {405}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("service", SERVICES)
async def test_requests_made_from_the_document(stack: Stack, service: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(document(stack, service))
    count = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        scene = await Scene.set(stack)
        try:
            # The services answer in this loop, so the generator must run beside it.
            await asyncio.to_thread(fuzz, operation, mode, stack.nodes[service].url, scene)
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE, operation.label
            assert not list(operation.body or ()), operation.label
            assert not list(operation.query), operation.label
            continue
        count += 1
    assert count >= 5


def fuzz(operation: Any, mode: GenerationMode, url: str, scene: Scene) -> None:
    names = [parameter.name for parameter in operation.path_parameters]
    known = {name: scene.ids[name] for name in names if name in scene.ids}
    # Valid requests are about what exists; made-up ids would all end at the same 404.
    about = {"path_parameters": known} if known and mode is GenerationMode.POSITIVE else {}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, **about))
    def check(case: Any) -> None:
        response = case.call(base_url=url, headers=scene.person.headers, timeout=10)
        if response.status_code >= 500:
            assert response.json()["code"] in MISSING_NEIGHBOURS, (case, response.text)
        if response.status_code not in AT_THE_DOOR:
            case.validate_response(response, checks=CHECKS)

    check()

"""The OpenAPI document says what is served, no more and no less: held against the router and the handlers."""

import re
from typing import Any

import aiohttp
import msgspec
import pytest
import schemathesis
from http_front import FakeFront, serving

from engine.config import ServerOptions
from engine.errors import RequestError
from engine.http.app import ROUTES, create_app
from engine.http.openapi import describe
from engine.params.sampling import RANGES, SamplingParams, check_sampling

DOCUMENT = describe(ROUTES, models=["fake"], keyed=False)
BODIES = [route for route in ROUTES if route.takes is not None and route.method == "POST"]


def operations() -> set[tuple[str, str]]:
    return {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}


def test_every_served_route_is_described_and_every_described_one_is_served() -> None:
    app = create_app(FakeFront(), ServerOptions())  # type: ignore[arg-type]
    served = {
        (route.method, re.sub(r":\.\+", "", route.resource.canonical))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert served == operations()


def test_every_reference_leads_somewhere() -> None:
    found = set(re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', msgspec.json.encode(DOCUMENT).decode()))
    assert found == {name for name in DOCUMENT["components"]["schemas"] if name in found}
    assert {"ChatBody", "MessagesBody", "ErrorReply", "AnthropicErrorReply", "TokenizeReply"} <= found


def test_every_operation_is_summed_up_once() -> None:
    every = [operation for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert all(operation["summary"].endswith(".") for operation in every)
    assert len({operation["operationId"] for operation in every}) == len(every)


def test_it_is_openapi() -> None:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.validate()
    assert {(found.ok().method.upper(), found.ok().path) for found in schema.get_all_operations()} == operations()


def test_bounds_and_what_is_not_served_are_in_it() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert schemas["MessagesBody"]["properties"]["max_tokens"]["minimum"] == 1
    assert schemas["MessagesBody"]["additionalProperties"] is False
    assert schemas["ChatBody"]["properties"]["modalities"]["enum"] == [["text"], None]
    assert schemas["MessagesBody"]["properties"]["speed"]["description"] == "ignored"
    assert schemas["MessagesBody"]["required"] == ["messages", "max_tokens"]


@pytest.mark.parametrize("name", RANGES)
def test_the_bounds_of_sampling_are_those_that_are_checked(name: str) -> None:
    step = 1e-9 if name in ("temperature", "top_p", "min_p") or name.endswith("penalty") else 1
    bounds = dict(RANGES[name])
    least = bounds.pop("exclusiveMinimum") + step if "exclusiveMinimum" in bounds else bounds.pop("minimum")
    for value in (least, bounds["maximum"]):
        check_sampling(SamplingParams(**{name: value}))  # type: ignore[arg-type]
    for value in (least - step, bounds["maximum"] + step):
        with pytest.raises(RequestError, match=name):
            check_sampling(SamplingParams(**{name: value}))  # type: ignore[arg-type]


def test_bounds_reach_the_bodies() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for body, name, bounds in (
        ("ChatBody", "max_completion_tokens", RANGES["max_tokens"]),
        ("CompletionBody", "temperature", RANGES["temperature"]),
        ("NativeSampling", "sampling_seed", RANGES["seed"]),
        ("ResponsesBody", "top_p", RANGES["top_p"]),
        ("MessagesBody", "top_k", RANGES["top_k"]),
    ):
        (number,) = (one for one in schemas[body]["properties"][name]["anyOf"] if one["type"] != "null")
        assert bounds.items() <= number.items()


@pytest.mark.parametrize(("key", "asked"), [(None, False), ("sesame", True)])
def test_it_says_whether_a_key_is_asked_for(key: str | None, asked: bool) -> None:
    document = describe(ROUTES, models=["fake"], keyed=key is not None)
    assert ("securitySchemes" in document["components"]) == asked
    assert ("security" in document["paths"]["/generate"]["post"]) == asked
    assert "security" not in document["paths"]["/health"]["get"]


@pytest.mark.anyio
async def test_a_body_is_decoded_by_what_describes_it() -> None:
    """Each field of a described body is known to the handler, in that no other field is."""
    async with serving(FakeFront()) as url, aiohttp.ClientSession(url) as session:
        async with session.get("/openapi.json") as response:
            assert (response.status, await response.read()) == (200, msgspec.json.encode(DOCUMENT))
        for route in BODIES:
            known = DOCUMENT["components"]["schemas"][route.takes.__name__]["properties"]  # type: ignore[union-attr]
            path = route.public_path.replace("{response_id}", "x")
            for name in (*known, "surely_unknown"):
                async with session.post(path, json={name: {"no": ["such", "value"]}}) as response:
                    error: Any = (await response.json()).get("error") or {}
                refused = error.get("code") == "unknown_parameter" and error["param"] == name
                assert refused == (name == "surely_unknown"), (route.path, name)

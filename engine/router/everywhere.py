"""Routes that are for all workers at once: the union of their models, and what is to be done by each of them.

What each worker answered stands in the answer by its URL. Where all answers are objects, numbers of one name are
added, and truths are true where all are: a client that knows one engine reads the fleet as one. It is a 502 if a worker
could not be asked, with the answers of the others. Left out: workers that were added since.
"""

import asyncio
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from msgspec import Struct

from engine.http.intake import read_body
from engine.http.keys import KEY
from engine.http.openapi import Route
from engine.http.wire import json_response
from engine.router.asked import object_in
from engine.router.proxy import passed
from engine.router.router import ROUTER
from engine.router.workers import Worker

SECONDS = 60.0  # that a worker may take
# Of the engine, of SGLang and of vLLM.
PATHS = (
    *("/flush_cache", "/pause_generation", "/continue_generation", "/start_profile", "/stop_profile"),
    *("/expert_distribution/start", "/expert_distribution/stop", "/reset_prefix_cache", "/pause", "/resume", "/sleep"),
    *("/wake_up", "/release_memory_occupation", "/resume_memory_occupation", "/update_weights_from_disk"),
    "/v1/programs/end",
)


class Said(Struct):
    """What one worker answered: a status, 0 if it did not, and a body."""

    url: str
    status: int
    body: Any


async def _of_each(
    request: web.Request, workers: list[Worker], path: str, body: bytes | None = None, method: str = "POST"
) -> list[Said]:
    """What `workers` answer to a GET, or where there is a `body`, to that `method`."""
    health, caller = request.app[ROUTER].health, passed(request)
    method, seconds = ("GET", None) if body is None else (method, SECONDS)

    async def ask(worker: Worker) -> Said:
        try:
            status, data = await health.ask(
                worker, path, method=method, body=body or b"", caller=caller, seconds=seconds
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return Said(worker.url, 0, f"no answer ({type(error).__name__})")
        try:
            return Said(worker.url, status, msgspec.json.decode(data) if data else None)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Said(worker.url, status, data.decode(errors="replace"))

    return list(await asyncio.gather(*map(ask, workers)))


def joined(answers: list[Said]) -> dict[str, Any]:
    """One object for all: sums, truths where all are true, else what the first said; and `workers`."""
    bodies = [each.body for each in answers if isinstance(each.body, dict) and each.status == 200]
    whole: dict[str, Any] = {}
    for name in dict.fromkeys(name for body in bodies for name in body):
        values = [body[name] for body in bodies if name in body]
        if all(isinstance(value, bool) for value in values):
            whole[name] = all(values)
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            whole[name] = sum(values)
        else:
            whole[name] = values[0]
    return whole | {"workers": {each.url: {"status": each.status, "answer": each.body} for each in answers}}


async def everywhere(request: web.Request) -> web.Response:
    """Ask every worker to do this, and join what they answer."""
    router, body = request.app[ROUTER], await read_body(request)
    workers = [worker for worker in router.fleet.workers.values() if worker.state != "gone"]
    path = request.rel_url.raw_path_qs
    answers = await _of_each(request, workers, path, body)
    bad = [each.status for each in answers if each.status != 200]
    alike = len(bad) == len(answers) and len(set(bad)) == 1 and bad[0]  # all refuse it in the same way
    return json_response(joined(answers), status=200 if not bad else bad[0] if alike else 502)


async def abort(request: web.Request) -> web.Response:
    """End a request of the caller's wherever it runs or waits, or all of everybody's."""
    router, body = request.app[ROUTER], await read_body(request)
    fields = object_in(body)
    rid, everything = fields.get("rid"), fields.get("abort_all") is True
    known = router.places.running(rid) if isinstance(rid, str) and not everything else []
    here = 0
    if everything or isinstance(rid, str):
        here = router.dispatcher.abort(None if everything else rid, request.get(KEY))
    workers = [worker for worker in router.fleet.workers.values() if worker.state != "gone"]
    if known:
        workers = [worker for worker in workers if worker.url in known]
    elif here and not everything:
        return json_response({"aborted": here})
    answers = await _of_each(request, workers, "/abort_request", body)
    whole = joined(answers)
    refused = [each for each in answers if each.status != 200]
    if answers and len(refused) == len(answers) and refused[0].status:
        return json_response(refused[0].body, status=refused[0].status)
    return json_response(whole | {"aborted": here + int(whole.get("aborted", 0))})


async def sessions(request: web.Request) -> web.Response:
    """The sessions of all workers, which of one id may be several; or end those of one id at each worker."""
    workers = [worker for worker in request.app[ROUTER].fleet.workers.values() if worker.state != "gone"]
    ends = b"" if request.method == "DELETE" else None
    answers = await _of_each(request, workers, request.rel_url.raw_path_qs, ends, request.method)
    good = [each.body for each in answers if each.status == 200 and isinstance(each.body, dict)]
    if not good:
        status, body = next(((each.status, each.body) for each in answers if each.status), (502, joined(answers)))
        return json_response(body, status=status)
    if ends is not None:
        return json_response(good[0])
    return json_response(good[0] | {"data": [each for body in good for each in body.get("data", ())]})


async def models(request: web.Request) -> web.Response:
    """The models of all workers, each once."""
    workers = [
        worker
        for worker in request.app[ROUTER].fleet.workers.values()
        if worker.state in ("ready", "starting", "unready")
    ]
    found: dict[str, Any] = {}
    whole: dict[str, Any] = {"object": "list"}
    for said in await _of_each(request, workers, "/v1/models"):
        data = said.body.get("data") if isinstance(said.body, dict) else None
        if not found and isinstance(data, list):
            whole = said.body  # whose shape is that of the client's API
        for each in data if isinstance(data, list) else ():
            if isinstance(each, dict) and isinstance(each.get("id"), str):
                found.setdefault(each["id"], each)
    return json_response(whole | {"data": list(found.values())})


ROUTES = (
    *(Route("POST", path, everywhere) for path in PATHS),
    Route("POST", "/abort_request", abort),
    Route("GET", "/v1/sessions", sessions),
    Route("DELETE", "/v1/sessions/{session_id:.+}", sessions),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/models/", models),
)

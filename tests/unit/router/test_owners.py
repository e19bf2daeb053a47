"""Behind a router as without one, what a client's key named is that client's alone: the router names it to workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from house import House, open_house
from http_front import FakeFront, serving
from real_server import over_http
from routed import RawWorker, raw_worker, routing, says, until
from test_state import call

from engine.config import resolve
from engine.http.keys import CLIENT, client_name

pytestmark = pytest.mark.anyio
CLIENTS = ("alice", "bob")
TEXT = {"prompt": "one two three four five six seven eight nine ten " * 4, "max_tokens": 2}


def bearer(key: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} | headers


def lines(worker: RawWorker, name: str) -> list[list[str]]:
    """For each request that came: the values that it had of that header."""
    heads = [head.decode().split("\r\n")[1:] for head, _ in worker.asked]
    return [
        [line.partition(": ")[2] for line in head if line.partition(":")[0].lower() == name.lower()] for head in heads
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "worker-keys"
    path.write_text("worker\n")
    return path


def rewrite(file: Path, text: str) -> None:
    file.write_text(text)


# ── what a worker is told ────────────────────────────────────────────────────────────────────


async def everything(url: str, id: str, **headers: str) -> None:
    """A request to one worker, one about a response that no router has seen, and those that go to all."""
    await call(f"{url}/v1/completions", {"prompt": "a"}, headers=headers)
    await call(f"{url}/v1/responses/{id}", method="GET", headers=headers)
    await call(f"{url}/v1/programs/end", {"programs": ["p"]}, headers=headers)
    for method, path in (("GET", "/v1/sessions"), ("DELETE", "/v1/sessions/s")):
        await call(url + path, method=method, headers=headers)
    await call(f"{url}/abort_request", {"rid": "r"}, headers=headers)


async def test_a_client_is_named_under_the_key_of_each_worker_and_cannot_name_itself(file: Path) -> None:
    async with raw_worker(says(b"{}")) as one, raw_worker(says(b"{}")) as two:
        rewrite(file, f"worker\n{two.url} second\n")
        async with (
            routing(one.url, two.url, worker_key_file=str(file), api_key=CLIENTS) as (url, _),
            routing(one.url, two.url, worker_key_file=str(file), api_key=CLIENTS) as (other, _),
        ):
            forged = {CLIENT: client_name("bob", "worker"), "Connection": f"keep-alive, {CLIENT}"}
            await everything(url, "resp_a", Authorization="Bearer alice", **forged)
            await everything(other, "resp_b", **{"x-api-key": "alice", "Authorization": "Bearer wrong"}, **forged)
        for worker, key in ((one, "worker"), (two, "second")):
            assert len(worker.asked) >= 10
            assert lines(worker, CLIENT) == [[client_name("alice", key)]] * len(worker.asked)
            assert lines(worker, "Authorization") == [[f"Bearer {key}"]] * len(worker.asked)
            assert lines(worker, "x-api-key") == [[]] * len(worker.asked)
            assert not any(b"alice" in head for head, _ in worker.asked)


async def test_a_client_whose_key_is_passed_on_is_named_by_it_and_one_without_a_key_is_not_named(file: Path) -> None:
    forged = {CLIENT: client_name("bob", "bob")}
    async with raw_worker(says(b"{}")) as one:
        async with routing(one.url, api_key=CLIENTS) as (url, _):
            await everything(url, "resp_a", **{"x-api-key": "alice"}, **forged)
        assert lines(one, CLIENT) == [[client_name("alice", "alice")]] * len(one.asked)
        assert lines(one, "x-api-key") == [["alice"]] * len(one.asked)
        for options in ({}, {"worker_key_file": str(file)}):
            one.asked.clear()
            async with routing(one.url, **options) as (url, _):
                await everything(url, "resp_b", **bearer("unchecked"), **forged)
            assert lines(one, CLIENT) == [[]] * len(one.asked) and one.asked


async def test_a_request_in_the_queue_is_aborted_by_its_client_alone() -> None:
    front = FakeFront(hangs=True)
    async with (
        serving(front) as one,
        routing(one, worker_limit=1, api_key=CLIENTS) as (url, router),
        asyncio.TaskGroup() as group,
    ):
        tasks = []
        for waiting in (0, 1):
            headers = bearer("alice", **{"X-Request-Id": "mine"})
            tasks.append(group.create_task(call(f"{url}/generate", {"text": "a"}, headers=headers)))
            await until(lambda waiting=waiting: bool(front.open) and router.dispatcher.waiting == waiting)
        for client, aborted in (("bob", 0), ("alice", 2)):  # one in the queue, and one at the worker
            status, body = await call(f"{url}/abort_request", {"rid": "mine"}, headers=bearer(client))
            assert (status, body["aborted"]) == (200, aborted)
        for task in tasks:
            task.cancel()


# ── whole engines ────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def engine(**options: Any) -> AsyncIterator[tuple[House, str]]:
    """A whole engine without a device."""
    async with (
        open_house(max_model_len=4000) as house,
        over_http(house.front, resolve({"port": 0, **options}).server) as url,
    ):
        yield house, url


class Client:
    """Asks `url` with its key."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.headers = bearer(key)

    async def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return await call(self.url + path, body, method=method, headers=self.headers)

    async def sessions(self) -> list[str]:
        status, body = await self("GET", "/v1/sessions")
        assert status == 200, body
        return [each["id"] for each in body["data"]]


@pytest.mark.parametrize(("asked", "own"), [(("worker",), True), (None, False), (CLIENTS, False)])
async def test_clients_see_what_is_theirs_through_any_router(
    asked: tuple[str, ...] | None, own: bool, file: Path
) -> None:
    """Of engines that ask for the router's own key, for none, or for those of the clients, which are passed on."""
    options: dict[str, Any] = {"api_key": CLIENTS, "wait": False} | ({"worker_key_file": str(file)} if own else {})
    async with (
        engine(api_key=asked) as (house, one),
        routing(one, **options) as (url, _),
        routing(one, **options) as (other, _),
    ):
        alice, bob, beyond = Client(url, "alice"), Client(url, "bob"), Client(other, "alice")
        assert (await alice("POST", "/v1/completions", {**TEXT, "session_id": "s"}))[0] == 200
        assert (await bob.sessions(), await alice.sessions(), await beyond.sessions()) == ([], ["s"], ["s"])
        assert (await bob("DELETE", "/v1/sessions/s"))[0] == 404
        assert (await beyond("DELETE", "/v1/sessions/s"))[0] == 200
        assert await alice.sessions() == []

        assert (await alice("POST", "/v1/completions", {**TEXT, "program": "p"}))[0] == 200
        for client, left in ((bob, True), (beyond, False)):
            assert (await client("POST", "/v1/programs/end", {"programs": ["p"]}))[0] == 200
            await client.sessions()  # which is answered after that
            assert bool(house.scheduler.scheduler._pages.pins.nodes()) == left

        id = (await alice("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 2}))[1]["id"]
        for router in (url, other):  # of which one has seen it, and the other asks
            stranger = Client(router, "bob")
            for method, path in (("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")):
                status, body = await stranger(method, f"/v1/responses/{id}{path}")
                assert (status, body["error"]["code"]) == (404, "response_not_found")
            more = {"input": "more", "previous_response_id": id}
            for path in ("/v1/responses", "/v1/responses/input_tokens"):
                status, body = await stranger("POST", path, more)
                assert (status // 100, body["error"]["code"]) == (4, "previous_response_not_found")
        assert (await beyond("GET", f"/v1/responses/{id}"))[1]["id"] == id
        assert (await alice("POST", "/v1/responses", {**more, "max_output_tokens": 2}))[0] == 200
        direct = await Client(one, "alice")("GET", f"/v1/responses/{id}")
        assert direct[0] == {None: 404, ("worker",): 401, CLIENTS: 200}[asked]
        assert (await beyond("DELETE", f"/v1/responses/{id}"))[0] == 200


async def test_a_new_key_of_a_worker_makes_new_clients_and_the_old_one_brings_them_back(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.router.keys.RELOAD_SECONDS", 0.0)
    options = {"worker_key_file": str(file), "api_key": CLIENTS}
    async with engine(api_key=("worker", "new-worker")) as (_, one), routing(one, **options) as (url, _):
        alice, bob = Client(url, "alice"), Client(url, "bob")
        assert (await alice("POST", "/v1/completions", {**TEXT, "session_id": "s"}))[0] == 200
        rewrite(file, "new-worker\n")
        assert (await alice.sessions(), await bob.sessions()) == ([], [])
        assert (await bob("POST", "/v1/completions", {**TEXT, "session_id": "s"}))[0] == 200
        assert (await alice.sessions(), await bob.sessions()) == ([], ["s"])
        rewrite(file, "worker\n")
        assert (await alice.sessions(), await bob.sessions()) == (["s"], [])
        # Who has the worker's key is another one still, and can be a client only by that client's key.
        assert await Client(one, "worker").sessions() == []
        theirs = client_name("alice", "worker")
        for key, name, found in (
            ("worker", "alice", []), ("worker", client_name("bob", "worker"), []), ("worker", theirs, ["s"]),
            ("new-worker", theirs, []),
        ):  # fmt: skip
            direct = Client(one, key)
            direct.headers[CLIENT] = name
            assert await direct.sessions() == found

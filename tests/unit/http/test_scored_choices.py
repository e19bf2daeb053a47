"""/v1/choices and /v1/programs/end, on the fake device, whose log-probability of a token is `logprob`: choices are
scored behind one prompt, which is computed once, and programs keep what they have computed until they end."""

import pytest
from test_http import HI, post
from test_http_choices import logprob, served

pytestmark = pytest.mark.anyio
PROMPT = "a b c d " * 8  # of 64 tokens, one a byte


def scores_of(prompt: str, choice: str) -> list[float]:
    return [pytest.approx(logprob(byte, len(prompt) + place)) for place, byte in enumerate(choice.encode())]


async def test_choices_are_scored_behind_a_prompt_that_is_computed_once() -> None:
    async with served() as (url, _):
        status, body = await post(f"{url}/v1/choices", {"prompt": PROMPT, "choices": ["yes", "no"], "program": "p"})
        assert status == 200
        assert [each["ids"] for each in body["choices"]] == [list(b"yes"), list(b"no")]
        assert [each["logprobs"] for each in body["choices"]] == [scores_of(PROMPT, "yes"), scores_of(PROMPT, "no")]
        assert "alone" not in body["choices"][0]
        first, page = len(PROMPT), 4
        assert body["usage"] == {"prompt_tokens": 2 * first + 5, "cached_tokens": (first - 1) // page * page}
        status, body = await post(
            f"{url}/v1/choices", {"prompt": PROMPT, "choices": ["yes", "no"], "alone": True, "program": "p"}
        )
        assert [each["alone"][0] for each in body["choices"]] == [0.0, 0.0]  # nothing predicts a first token
        assert body["choices"][0]["alone"][1:] == scores_of("", "yes")[1:]
        assert await post(f"{url}/v1/programs/end", {"programs": ["p", "unknown"]}) == (200, {"ended": 2})


async def test_choices_behind_a_chat_go_on_with_the_assistants_message() -> None:
    async with served() as (url, _):
        ids = []
        for more in ([], [{"role": "assistant", "content": "It is "}]):
            asked = {"messages": HI + more, "choices": ["good", "bad"]}
            status, body = await post(f"{url}/v1/choices", asked | {"continue_final_message": bool(more)})
            assert status == 200, body
            ids.append([each["ids"] for each in body["choices"]])
        assert ids == [[list(b"good"), list(b"bad")]] * 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": "a", "choices": []}, "choices has 0; send from 1 to 256"),
        ({"prompt": "a", "choices": ["b", ""]}, "choices[1] is empty"),
        ({"choices": ["b"]}, "neither prompt nor messages"),
        ({"prompt": "a", "messages": HI, "choices": ["b"]}, "both prompt and messages"),
        ({"prompt": "a", "choices": ["b"], "program": "p" * 257}, "program has 257 characters"),
    ],
)
async def test_what_cannot_be_scored_is_refused(body: dict, says: str) -> None:
    async with served() as (url, _):
        status, answer = await post(f"{url}/v1/choices", body)
        assert status == 400 and says in answer["error"]["message"]

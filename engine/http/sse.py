"""Server-sent events: how an answer begins and fails, and one write for each item of an iterator.

The status line is sent only when the first item is there, so a refused request is still answered with its own
status. A failure after that can only be one more event: `data: {"error": …}`, and the stream ends without
`[DONE]`. A slow client blocks its own handler (the transport's buffer is bounded), nobody else's. Left out: the events
of replies that are being made, which no iterator gives (`streams`).
"""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from aiohttp import web

from engine.errors import RequestError, Words, WorkerError, let_go
from engine.http.wire import error_object, to_json

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}
# How errors about a request are told, once its handler knows: the words of its API, and what its client calls fields
# that have several names there.
WORDS = web.RequestKey("words", Words)
CALLED = web.RequestKey("called", dict[str, str])
OURS = Words()
log = logging.getLogger(__name__)


Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)


class Events(Protocol[Item_contra]):
    """How one API words what comes: chunks of one reply, or of several, numbered."""

    def event(self, item: Item_contra, /) -> bytes:
        """Bytes to write for `item`: no event, one or several, whole; the last ends with DONE."""


def data_event(payload: bytes) -> bytes:
    """One event whose data is `payload`, JSON on one line."""
    return b"data: %b\n\n" % payload


def words_of(request: web.Request) -> Words:
    """The words in which `request` is told of errors."""
    return request.get(WORDS, OURS).calling(request.get(CALLED, {}))


def describe_error(error: Exception, words: Words = OURS) -> tuple[int, dict[str, object]]:
    """The HTTP status and the OpenAI error object of any exception, whose life ends here; `words` are those of the
    client's API. Unforeseen ones are logged whole."""
    described = _described(error, words)
    let_go(error)
    return described


def _described(error: Exception, words: Words) -> tuple[int, dict[str, object]]:
    match error:
        case RequestError():
            error = error.worded(words)
            return error.status, error_object(error.message, status=error.status, code=error.code, param=error.param)
        case WorkerError():
            return 503, error_object(str(error), status=503, code="engine_unavailable")
        case _:
            log.error("a request failed for a reason that nothing foresaw", exc_info=error)
            message = f"the server failed on this request ({type(error).__name__}); its log has the traceback"
            return 500, error_object(message, status=500, code="internal_error")


def failure_event(error: Exception, words: Words) -> bytes:
    """The last event of a stream that fails, as OpenAI's completions shape it."""
    return data_event(to_json(describe_error(error, words)[1]))


async def send_events(
    request: web.Request,
    chunks: AsyncIterator[Item],
    events: Events[Item],
    *,
    failure: Callable[[Exception, Words], bytes] = failure_event,
) -> web.StreamResponse:
    """Answer `request` with `chunks` as they come; what the first chunk raises is raised here.

    `failure` makes the event of an error after that."""
    first = await anext(chunks)
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(request)
    if request.method == "HEAD":  # is answered by the head alone
        await response.write_eof()
        return response
    try:
        if data := events.event(first):
            await response.write(data)
        async for chunk in chunks:
            if data := events.event(chunk):
                await response.write(data)
    except ConnectionError:  # the client is gone: nobody to tell
        raise
    except Exception as error:
        await response.write(failure(error, words_of(request)))
    await response.write_eof()
    return response

"""The media actor: stands before the tokenizer where a model sees, and gets what requests show.

    front ── Generate ──> media ── Generate, with what the processor made of its images and video ──> tokenizer
                            │ └─ refused: the detokenizer ends the reply
                            └── MediaStore: read, decode, prepare (engine/media/store.py)

What has no media goes through at once and may go past what waits; an Abort ends the wait, and with it what is fetched
for that request alone. A model that reads text alone has no such actor.
"""

import logging
from collections.abc import Sequence

import anyio
import msgspec

from engine.conversation.parts import Image, Video, media_of, without_sources
from engine.errors import RequestError, let_go
from engine.media.store import MediaStore
from engine.messages import ToDetokenizer, ToTokenizer
from engine.messages.reply import Failed, Tokens
from engine.messages.request import Abort, Generate, Open
from engine.runtime.actor import first_failure
from engine.runtime.channel import Outbox, Receiver

log = logging.getLogger("engine.media")


class MediaActor:
    name = "media"

    def __init__(
        self,
        store: MediaStore,
        inbox: Receiver[ToTokenizer],
        tokenizer: Outbox[ToTokenizer],
        detokenizer: Outbox[ToDetokenizer],
    ) -> None:
        self.store = store
        self.inbox = inbox
        self.tokenizer = tokenizer
        self.detokenizer = detokenizer
        self._waiting: dict[str, anyio.CancelScope] = {}  # by rid

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                async for message in self.inbox:
                    match message:
                        case Generate(media=()) if media := message.shown or media_of(message.messages or ()):
                            scope = self._waiting[message.rid] = anyio.CancelScope()
                            group.start_soon(self._get, message, media, scope)
                        case Abort(rid) if rid in self._waiting:
                            self._waiting[rid].cancel()
                        case Abort(rid):
                            self.store.release(rid)  # which its front may have done before it was held
                            await self.tokenizer.send(message)
                        case _:
                            await self.tokenizer.send(message)
                    del message  # not held while the next one is waited for
                group.cancel_scope.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None

    async def _get(self, request: Generate, media: Sequence[Image | Video], scope: anyio.CancelScope) -> None:
        """Hand `request` on with what it shows."""
        try:
            with scope:
                prepared = await self.store.resolved(media)
            if scope.cancel_called:  # if only just: nobody else was told of the Abort
                await self.detokenizer.send(Open(request.rid, 0, ()))
                await self.detokenizer.send(Tokens.aborted(request.rid))
                return
            self.store.hold(request.rid, prepared)
            messages = [without_sources(message) for message in request.messages or ()] or None
            await self.tokenizer.send(msgspec.structs.replace(request, messages=messages, shown=(), media=prepared))
        except RequestError as error:
            let_go(error)
            await self.detokenizer.send(Failed.of(request.rid, error))
        except Exception as error:  # of a URL's many ways to go wrong, one that nothing foresaw
            log.error("the media of a request cannot be got, for a reason that nothing foresaw", exc_info=error)
            said = f"the server failed on this request ({type(error).__name__}); its log has the traceback"
            await self.detokenizer.send(Failed(request.rid, 500, "internal_error", said))
        finally:
            del self._waiting[request.rid]

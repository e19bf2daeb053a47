"""The tokenizer actor: what a client sent becomes token ids and a checked `Admit`.

`Admission` is the logic; the actor moves messages. A long text is encoded in a thread (the tokenizers
library lets go of the interpreter lock), so it does not delay the text of other requests.
"""

import random
from array import array

import anyio.to_thread
from anyio.streams.memory import MemoryObjectReceiveStream

from engine.channel import Outbox
from engine.errors import RequestError
from engine.messages import (
    Abort,
    Admit,
    Failed,
    FromFront,
    Generate,
    Open,
    Sampling,
    SamplingParams,
    ToDetokenizer,
    ToTokenizer,
    WorkerReady,
)
from engine.text import Text

THREAD_CHARACTERS = 20_000


class Admission:
    """Turns a `Generate` into what the detokenizer and the scheduler need to know of it."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.max_model_len: int | None = None
        self._seeds = random.SystemRandom()

    def admit(self, request: Generate) -> tuple[Open, Admit]:
        """Raises RequestError: no or too long a prompt, an id outside the vocabulary, a bad template."""
        ids = self._encode(request)
        params = request.sampling
        max_new = self._max_new(len(ids), params.max_tokens, request.default_max_tokens)
        sampling = Sampling(
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
        )
        stop_ids = self._stop_ids(params)
        return (
            Open(request.rid, len(ids), params.stop),
            Admit(request.rid, ids.tobytes(), sampling, stop_ids, max_new, request.priority),
        )

    def _encode(self, request: Generate) -> "array[int]":
        if request.messages is not None:
            return array("i", self.text.encode_chat(request.messages))
        if request.text is not None:
            ids = array("i", self.text.encode(request.text))
        else:
            ids = array("i")
            ids.frombytes(request.ids or b"")
            vocabulary = self.text.vocab_size
            if wrong := next((token for token in ids if not 0 <= token < vocabulary), None):
                raise RequestError(
                    f"token id {wrong} is outside the vocabulary; use ids from 0 to {vocabulary - 1}", param="prompt"
                )
        if not ids:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        return ids

    def _max_new(self, prompt: int, wanted: int | None, default: int | None) -> int:
        assert self.max_model_len is not None, "requests are let in only once the worker is ready"
        room = self.max_model_len - prompt
        if room < 1:
            raise RequestError(
                f"the prompt has {prompt} tokens and the model's length is {self.max_model_len} for prompt and reply "
                f"together; shorten the prompt to at most {self.max_model_len - 1} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > room:
            raise RequestError(
                f"max_tokens {wanted} and a prompt of {prompt} tokens are over the model's length of "
                f"{self.max_model_len}; ask for at most {room} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return room if default is None else min(room, default)

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        own = () if params.ignore_eos else self.text.spec.eos_ids
        return tuple(dict.fromkeys((*own, *params.stop_token_ids)))


class TokenizerActor:
    name = "tokenizer"

    def __init__(
        self,
        admission: Admission,
        inbox: MemoryObjectReceiveStream[ToTokenizer],
        detokenizer: Outbox[ToDetokenizer],
        scheduler: Outbox[FromFront],
    ) -> None:
        self.admission = admission
        self.inbox = inbox
        self.detokenizer = detokenizer
        self.scheduler = scheduler

    async def run(self) -> None:
        async for message in self.inbox:
            match message:
                case Generate():
                    await self._generate(message)
                case Abort():
                    await self.scheduler.send(message)
                case WorkerReady():
                    self.admission.max_model_len = message.max_model_len

    async def _generate(self, request: Generate) -> None:
        try:
            if request.text is not None and len(request.text) > THREAD_CHARACTERS:
                opened, admitted = await anyio.to_thread.run_sync(self.admission.admit, request)
            else:
                opened, admitted = self.admission.admit(request)
        except RequestError as error:
            failed = Failed(request.rid, error.status, error.code, error.message, error.param)
            await self.detokenizer.send(failed)
            return
        await self.detokenizer.send(opened)
        await self.scheduler.send(admitted)

"""What the scheduler refuses at once: a request that waiting would never serve, or that cannot be told apart."""

from engine.errors import RequestError, counted
from engine.params.lengths import THE_INPUT, check_length
from engine.sched.request import Request


def rid_in_use(rid: str) -> RequestError:
    """For a request whose id a live one has."""
    return RequestError(
        f"request id {rid!r} is in use by a live request; choose another or wait until it ends",
        param="rid",
        code="duplicate_rid",
        status=409,
    )


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


def check(request: Request, max_model_len: int, max_step_tokens: int, pages: int, page_size: int) -> None:
    """Raises RequestError (400) if `request` can never fit into a step, if it asks for a vector, or into the cache."""
    if request.pools:
        check_whole(request, max_model_len, max_step_tokens)
    else:
        check_fits(request, max_model_len, pages, page_size)


def check_whole(request: Request, max_model_len: int, max_step_tokens: int) -> None:
    """Raises RequestError (400) if `request`, which asks for a vector, is empty or does not fit into one step."""
    if request.prompt_len == 0:
        message = "{input} has 0 tokens; send at least one"
        raise RequestError(message, param="input", code="empty_prompt", facts=THE_INPUT)
    most = min(max_model_len, max_step_tokens)
    if request.prompt_len > most:
        remedy = "" if max_model_len <= max_step_tokens else ", or start with a larger --max-step-tokens"
        raise RequestError(
            f"{{input}} has {request.prompt_len} tokens, and the model takes at most {most} at once; shorten it or "
            f"send it in parts{remedy}",
            param="input",
            code="context_length_exceeded",
            facts=THE_INPUT,
        )


def check_fits(request: Request, max_model_len: int, pages: int, page_size: int) -> None:
    """Raises RequestError (400) if `request` is empty or longer than the model or the whole KV cache allows."""
    prompt, new = request.prompt_len, request.limit - request.prompt_len
    if prompt == 0:
        raise RequestError("the prompt has 0 tokens; send at least one", param="prompt", code="empty_prompt")
    check_length(prompt, new, max_model_len)
    needed = pages_for(prompt + new - 1, page_size)  # the last token is never computed
    if needed > pages:
        raise RequestError(
            f"{counted(prompt, 'prompt token')} and {{max_tokens}} {new} need {counted(needed, 'KV page')} of "
            f"{counted(page_size, 'token')}, but there are {pages}; keep prompt + {{max_tokens}} within "
            f"{pages * page_size + 1}, or start with more KV memory",
            param="max_tokens",
            code="kv_capacity_exceeded",
            facts={},
        )

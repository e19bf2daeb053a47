"""A pytest plugin for what runs in Triton's interpreter: calls within a kernel cost a quarter less.

At each call of a device function, the interpreter looks through the modules of triton.language for builtins to replace.
The launch of a kernel has done so for triton.language, and gives them back at its end. What the first call replaces in
triton.language.core, which Triton's own functions use, stays replaced. So here later calls only call.
"""

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_seen: set[bool] = set()


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    own = any(value is tl.core for value in function.fn.__globals__.values() if inspect.ismodule(value))
    if own and own not in _seen:
        _seen.add(own)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call

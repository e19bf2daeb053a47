"""A model's step recorded as the C calls that it consists of, to be made again without the Python in between.

What a CUDA graph is to a GPU: the calls are repeated with the same addresses, so whoever replays first writes the
step's numbers where the recorded step read them. What torch computes would be left out of a replay; a recording
notices it, and must then not be replayed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.kernels.cpu.calls import Kernels

ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)


class Recording(TorchDispatchMode):
    """Within `with Recording(kernels) as recording:` C calls are made and noted, and all memory that they use is kept.

    `computed` names what torch computed meanwhile; `replay` is right only where that is empty.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.computed: set[str] = set()
        self._kernels = kernels
        self._library = kernels.library
        self._calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._held: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, for a second, to keep `__torch_dispatch__` from being compiled. Nothing here
        is compiled anyway."""
        return False

    def __enter__(self) -> "Recording":
        self._kernels.library = _Recorder(self._library, self._calls)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kernels.library = self._library

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self._held.append(result)
        if function not in ALLOCATIONS and (function._schema.is_mutable or not _is_view(result, (args, kwargs))):
            self.computed.add(str(function))
        return result

    def replay(self) -> None:
        """Makes the calls again."""
        for function, arguments in self._calls:
            function(*arguments)


class _Recorder:
    """The library, with each call noted."""

    def __init__(self, library: Any, calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self._library = library
        self._calls = calls

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def recorded(*arguments: Any) -> None:
            self._calls.append((function, arguments))
            function(*arguments)

        return recorded


def _is_view(result: Any, inputs: Any) -> bool:
    """Whether `result` is tensors that all lie in the memory of one of the `inputs`. A copy of no bytes is one, too."""
    known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    leaves = tree_leaves(result)
    return bool(leaves) and all(
        isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in known for leaf in leaves
    )

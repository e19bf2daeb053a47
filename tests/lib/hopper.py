"""Triton kernels compiled for a Hopper GPU, without one: the interpreter runs what the compiler refuses, as where a
variable has another type in each branch, and knows nothing of shared memory. Takes some seconds where Triton's cache
does not have them."""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = 227 << 10  # of a program on a Hopper GPU
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
DUMP = ASSEMBLER.with_name("cuobjdump")
MARKS = [
    pytest.mark.skipif(not ASSEMBLER.exists(), reason="Triton is installed without its assembler for NVIDIA GPUs"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]


def types_by_name(names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """From each type's arguments to each argument's type."""
    return {name: kind for kind, arguments in names.items() for name in arguments}


def compile_for_hopper(
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str | tuple[str, ...]],
    *,
    multiples: Collection[str] = (),
    **options: int,
) -> Any:
    """What Triton makes of `kernel`. Arguments that are in neither are int32; those that it does not have are passed
    over, and several types are those of a tuple. Pointers are of 16 bytes, as those of torch's allocator: copies would
    be of single numbers, and none would run ahead, if they were not. The integers `multiples` are multiples of 16."""
    values = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in values else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in values.items()}
    aligned: Any = {}
    for place, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            aligned |= {(place, each): [["tt.divisibility", 16]] for each in range(len(kind))}
        elif kind.startswith("*") or name in multiples:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))


def bytes_spilled(made: Any) -> int:
    """Those of a thread's stack: registers that did not suffice."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(DUMP), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1])

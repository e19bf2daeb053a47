"""The pages of a step's rows, end to end: for attention libraries that want one list instead of a page table.

    page_table [slots, P]        offsets  0    3  4      6
    row 0 -> slot 7: a b c . .   pages    a b c  d  e f
    row 1 -> slot 2: d . . . .
    row 2 -> slot 5: e f . . .

How many pages a row has is read on the device, so nothing here depends on the host and one launch serves any step.
Left out: rows that share pages; a page is named once for each row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # pages that a program copies at a time
PROGRAMS = 8  # for each row


@triton.jit(do_not_specialize=["line"], do_not_specialize_on_alignment=["slots", "offsets", "pages"])
def _list_kernel(page_table, slots, offsets, pages, line, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    row = tl.program_id(0)
    first = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - first
    slot = tl.load(slots + row).to(tl.int64)
    for begin in range(tl.program_id(1) * BLOCK, count, PROGRAMS * BLOCK):
        column = begin + tl.arange(0, BLOCK)
        there = column < count
        page = tl.load(page_table + slot * line + column, mask=there)
        tl.store(pages + first + column, page, mask=there)


def list_pages(page_table: Tensor, slots: Tensor, offsets: Tensor, pages: Tensor) -> None:
    """As `list_pages` in reference.py."""
    assert page_table.stride(1) == 1 and page_table.dtype == pages.dtype == offsets.dtype == torch.int32
    grid = (len(slots), PROGRAMS)
    _list_kernel[grid](page_table, slots, offsets, pages, page_table.stride(0), BLOCK=BLOCK, PROGRAMS=PROGRAMS)

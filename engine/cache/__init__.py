"""Which page holds what: a pool of page numbers and a tree of cached prefixes. Pure integers, no device memory."""

"""What an H200 can do at most, measured on one: a plain copy, a large matrix product; on two, a copy between."""

BANDWIDTH = 4.3e12  # bytes a second
RATE = 790e12  # operations a second in bfloat16
RATE_FP8 = 2 * RATE
LINK = 394e9  # bytes a second from one GPU to another of its host, each way

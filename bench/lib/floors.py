"""What an H200 can do at most, measured on one: a plain copy, and a large matrix product."""

BANDWIDTH = 4.3e12  # bytes a second
RATE = 790e12  # operations a second in bfloat16
RATE_FP8 = 2 * RATE

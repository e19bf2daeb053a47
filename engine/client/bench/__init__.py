"""`engine bench`: one load generator for servers (ours or any OpenAI-compatible one) and the offline engine.

traffic (seeded prompts) -> load (asks, and notes when each piece came) -> report (table, JSON) and plot (SVG)

Left out: accuracy, and traffic from recorded data sets.
"""

"""From what a client asks a reply to be to something that masks can be made of; docs/grammars.md has the way.

What a request may say is in engine/params/grammar.py; `compiler` is the process that compiles it where it can be
killed. Using what was compiled is the worker's (engine/worker/sampling/grammars.py), waiting for it the scheduler's
(engine/sched/assets.py).
"""

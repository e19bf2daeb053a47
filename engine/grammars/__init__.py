"""Compiles the grammar of a request so that masks can be made of it; docs/grammars.md says how.

engine/params/grammar.py checks the grammar, and `compiler` is a process that compiles it and can be killed. The worker
uses the result (engine/worker/sampling/grammars.py); requests wait for it in engine/sched/assets.py.
"""

"""Grammars by llguidance, and JSON Schema rewritten so that it takes it."""

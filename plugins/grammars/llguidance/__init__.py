"""Grammars by llguidance, and JSON Schema in the words that it takes."""

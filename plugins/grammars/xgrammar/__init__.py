"""Grammars by XGrammar."""

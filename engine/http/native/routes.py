"""The routes of SGLang's and vLLM's own APIs, joined; each module declares those that it serves."""

from engine.http import sessions
from engine.http.native import choices, generate, programs, tokenize

ROUTES = (*generate.ROUTES, *choices.ROUTES, *programs.ROUTES, *tokenize.ROUTES, *sessions.ROUTES)

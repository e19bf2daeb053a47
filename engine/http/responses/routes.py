"""The routes of OpenAI's Responses API, joined; each module declares those that it serves."""

from engine.http.responses import responses, tokens

ROUTES = (*responses.ROUTES, *tokens.ROUTES)

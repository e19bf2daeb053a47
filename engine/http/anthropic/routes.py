"""The routes of Anthropic's Messages API, joined; each module declares those that it serves."""

from engine.http.anthropic import messages

ROUTES = (*messages.ROUTES,)

"""The routes of people who read, joined; each module declares those that it serves."""

from engine.http.page import live, pages

ROUTES = (*pages.ROUTES, *live.ROUTES)

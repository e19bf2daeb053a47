"""The routes of operators, joined; each module declares those that it serves."""

from engine.http.admin import admin, cache, experts

ROUTES = (*admin.ROUTES, *cache.ROUTES, *experts.ROUTES)

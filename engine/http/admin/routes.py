"""The routes of operators, joined; each module declares those that it serves."""

from engine.http.admin import admin, experts

ROUTES = (*admin.ROUTES, *experts.ROUTES)

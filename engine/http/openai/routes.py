"""The routes of OpenAI's API, and the models, joined; each module declares those that it serves."""

from engine.http.openai import chat, completions, decisions, embeddings, models

ROUTES = (*chat.ROUTES, *completions.ROUTES, *decisions.ROUTES, *embeddings.ROUTES, *models.ROUTES)

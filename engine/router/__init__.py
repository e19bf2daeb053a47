"""The router: one address in front of many engines. No torch, no model code."""

"""Choosing what to remove."""

METHODS = ("skrr", "standins", "finercut", "shortgpt", "random")
"""How an order is chosen: the paper's way; by what stand-ins make up for; or other papers' ways (baselines.py)."""

RESUMABLE = ("skrr", "standins", "finercut")
"""Methods that take more than one step."""

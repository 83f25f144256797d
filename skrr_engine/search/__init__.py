"""Choosing what to remove."""

METHODS = ("widths", "skrr", "standins", "finercut", "shortgpt", "random")
"""How is chosen: widths under one budget; whole sub-blocks in the paper's way, or by what stand-ins make up for; or in
other papers' ways (baselines.py)."""

RESUMABLE = ("widths", "skrr", "standins", "finercut")
"""Methods that take more than one step."""

QUALITIES = {"best": "widths", "parts": "standins", "paper": "skrr"}
"""What is asked for -> the method: widths and stand-ins; whole parts with stand-ins; as in the paper."""

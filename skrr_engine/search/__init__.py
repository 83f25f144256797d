"""Choosing what to remove."""

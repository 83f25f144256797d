"""Encoder files loaded into ComfyUI, and saved from it."""

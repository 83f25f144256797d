"""Pictures and texts from plain values; no ComfyUI."""

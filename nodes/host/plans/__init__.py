"""Plans in ComfyUI: chosen in nodes, kept in folders, matched to encoders."""

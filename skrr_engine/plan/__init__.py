"""The plan: what is left out of an encoder, in which order, and what stands in its place. Values and text, no torch."""

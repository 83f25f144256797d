"""CLIP objects: seen as encoders, asked what is read of them, pruned."""

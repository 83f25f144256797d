"""A text encoder as a row of sub-blocks: how it is seen, what can stand at a place, and how it is rewired."""

"""How far a pruned encoder's conditioning is from the dense one's."""

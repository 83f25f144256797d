"""Single weights: which of them are set to zero. Works on (name, module) pairs, whatever they belong to."""

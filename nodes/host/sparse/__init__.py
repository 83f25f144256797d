"""Models and CLIPs whose weights are packed: made from dense ones, patched, saved and loaded."""

"""Bytes on disk: files written whole or not at all, and the safetensors format."""

"""Encoders and stand-ins in files."""

"""Backbones, heads, the model that is trained, and its files."""

"""Changing a model's shape: plans are data, and one file applies them."""

"""Text to learn: where it comes from, how it is split, and the order its tokens are read in."""

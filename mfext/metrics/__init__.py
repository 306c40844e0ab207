"""Measuring: raw sums first, every forgetting number a pure function of them."""

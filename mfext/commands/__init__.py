"""One readable story per verb."""

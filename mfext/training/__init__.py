"""Training of one stage: the Lightning module, the fit loop, the methods. Only door to lightning."""

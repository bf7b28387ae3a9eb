"""The preset `raresynth`: one residual network for all classes, whose class signal is annealed in."""

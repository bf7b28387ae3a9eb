"""The bundle: what was approved, and how to use it without torch."""

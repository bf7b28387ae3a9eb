"""Synthetic images for rare classes: made, measured, judged, and used only where they help."""

__version__ = "0.1.0"

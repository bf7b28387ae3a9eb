"""Judging synthetic images: encoder, distances, copying, the class gate."""

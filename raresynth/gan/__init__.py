"""Generators: networks, losses, training, sampling."""

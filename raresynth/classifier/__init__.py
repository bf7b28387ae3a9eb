"""Classifier arms: training, evaluation, the release gate."""

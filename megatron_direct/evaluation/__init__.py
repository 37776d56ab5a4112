"""Losses and multiple-choice scores of a model."""

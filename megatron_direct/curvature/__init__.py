"""Curvature of the validation loss: operators, Lanczos, spectrum."""

"""Indexed datasets, the samples in them, masks over them and blends of them."""

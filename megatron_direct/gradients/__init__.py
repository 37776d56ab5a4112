"""Per-sample gradients, taken from hooks and never kept whole."""

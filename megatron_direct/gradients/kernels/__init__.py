"""Ways of hashing a layer's gradients, one a file."""

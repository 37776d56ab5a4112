"""What commands share: pilot, sketches, curvature, solving and decay."""

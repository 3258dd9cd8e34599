"""Which data to learn from: preference strength and what is done with it, noise
detectors, filters and augmentations of pairs. Host code on NumPy arrays and rows."""

"""Times of norms and training steps on the chip at hand."""

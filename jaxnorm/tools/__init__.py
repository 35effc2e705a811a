"""Audit and recalibration of batch norms: the code that linen and nnx share."""

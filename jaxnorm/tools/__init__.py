"""Audit and recalibration of batch norms: what linen and nnx share."""

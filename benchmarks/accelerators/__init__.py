"""Bytes, kernels and collectives of norms, compiled for TPUs and GPUs."""

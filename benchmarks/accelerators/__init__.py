"""What compilers for TPUs and GPUs make of the norms: bytes, kernels and collectives."""

"""Benchmarks, in three programs.

    python -m benchmarks                 times beside other libraries, about 25 minutes on two cores
    python -m benchmarks --quick         the same within a minute
    python -m benchmarks.accelerators    bytes of programs that are compiled for TPUs and GPUs
    python -m benchmarks.chip_times      times on the chip at hand
    python -m benchmarks.adaptive        norms with a scale and bias for each example

Their folders are cpu_times, accelerators and chip_times. `programs` holds the norms of all
libraries, the cases, and whole training steps; `report` writes results.
"""

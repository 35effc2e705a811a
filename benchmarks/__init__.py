"""The benchmark: jaxnorm's five norms compared with other libraries.

python -m benchmarks            all cases, about 25 minutes on two CPU cores
python -m benchmarks --quick    within a minute
"""

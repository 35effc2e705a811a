"""The benchmark: jaxnorm's five norms beside everybody else's.

python -m benchmarks            everything, about 25 minutes on two CPU cores
python -m benchmarks --quick    within a minute
"""

"""Check the kernel of the device at hand: python -m jaxnorm.verify.

Each case runs with the kernel and with XLA. Results are compared with NumPy in float64, in units of
float32: an error of 1 is the distance between adjacent float32 numbers at the largest result, or at
the largest term of its sum or difference. Times are medians of interleaved rounds. The rate of a
pass is the least number of bytes that it must move, over its time; it is shown relative to the rate
of a copy of the same array.

By default it takes up to two minutes and 1 GB: no case is started that may end later, and timed
cases are small. `--full` runs all cases, and times arrays that are larger than caches.
"""

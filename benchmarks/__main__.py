"""python -m benchmarks: times on this machine's CPU or GPU (cpu_times/)."""

import sys

from benchmarks.cpu_times.command import main
from benchmarks.cpu_times.machine import restart_keeping_pages

if __name__ == "__main__":
    if "--page-faults" not in sys.argv:
        restart_keeping_pages()
    sys.exit(main())

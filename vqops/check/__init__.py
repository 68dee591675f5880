"""Whether the kernels are right and fast on the GPU at hand: `vqops check`.

Every implementation runs the same cases (cases.py) in child processes (child.py, runner.py), is compared with the
compiled kernels of the CPU, and is then timed beside the others (timing.py); record.py writes what was found for
vqops.dispatch to read. `python -m benchmarks.gpu`, the longer run for those who work on kernels, shares all of it.
"""

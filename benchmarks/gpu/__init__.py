"""The first fifteen minutes on a GPU machine without a network, in one command: `python -m benchmarks.gpu`.

plan.py has the parts, in order of what a second of them tells; kernels.py times the search with its kernels apart,
prepare.py builds beforehand what the machine should not have to, publish.py makes records and pages of what came back.
Cases and child processes are those of `vqops check`.
"""

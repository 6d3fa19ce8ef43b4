"""The `cuda` backend at run time: kernels launched from cubins, the op set, the runner with its captured graphs.

launch.py      how a kernel is started: from a cubin, by Triton, or only noted down
"""

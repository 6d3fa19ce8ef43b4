"""The `cuda` backend: the decoder over trtx's own kernels, compiled ahead of time for one kind of GPU.

backend.py    the backend as building sees it: memory, weights in kernel layout
trace.py      which kernels an engine needs
kernels.py    their compilers, and the cache of what was compiled
worker.py     the process that compiles
nvrtc.py      the compiler of the kernels in CUDA C++
tune.py       which algorithm of cuBLASLt is the fastest for each large product
"""

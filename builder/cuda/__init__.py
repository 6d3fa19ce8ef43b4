"""The `cuda` backend: the decoder over trtx's own kernels, compiled ahead of time for one kind of GPU.

kernels.py    which kernels an engine needs, and Triton's compiler
backend.py    the backend as building sees it: memory, weights in kernel layout
"""

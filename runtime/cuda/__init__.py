"""The `cuda` backend at run time.

launch.py       how a kernel is started: from a cubin, by Triton, or only noted down
cubins.py       kernels from an engine's machine code, through cuda-bindings
linear.py, attention.py, elementwise.py, experts.py, sampling.py
                what is launched for which shapes; the kernels are in `runtime.kernels`
cublaslt.py     products of many tokens
ops.py          the op set over them
deferred.py     what it leaves to the word that comes next
kv_cache.py     the paged KV cache
step.py         the numbers of a step, and how they reach the GPU
steps.py        steps as CUDA graphs, several at once, tokens that stay on the GPU
shapes.py       which shapes steps are padded to
graphs.py       how graphs are captured
load.py         weights from files to the GPU
runner.py       what the executor drives
meta.py         an engine's steps without its weights
traffic.py      what the kernels of a step read and write, counted without a GPU
"""

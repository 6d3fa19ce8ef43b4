"""GPU kernels in Triton: `trtx build` compiles them, tests interpret them on a CPU; engines that run do without.

Conventions. A kernel's run-time arguments come first and its constants (`tl.constexpr`) after them. Pointers are
16-byte aligned, sizes that a model fixes are constants, and only what changes from step to step is a run-time argument.
With `PDL` a kernel starts while the one before it still runs: it lets its own successor start at once
(`gdc_launch_dependents`), and waits (`gdc_wait`) before it touches anything but weights.
"""

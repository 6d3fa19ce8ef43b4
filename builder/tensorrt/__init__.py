"""The TensorRT backends: the decoder as a network of native layers, no plugins.

    library.py    the two modules, `tensorrt` and `tensorrt_rtx`; their logger, and errors in our words
    network.py    layers by short names, checked one by one
    linears.py    what each weight format is in layers
    ops.py        the op set: the decoder's vocabulary in layers
    modes.py      which format runs on which GPU, and why not
    plan.py       network, profiles and options to a serialized engine
    caches.py     what TensorRT measures and compiles on a GPU, kept between runs

Nothing here is imported before a command needs it, and trtx works without either module.
"""

"""Op sets: the small vocabulary that the decoder is written in, given a meaning.

`base.Ops` is the vocabulary. `torch_ops.TorchOps` is the reference: plain torch on any device.
"""

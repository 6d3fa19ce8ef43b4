"""Checkpoints in: the model as data (`ModelSpec`), the family table, sources, and the checkpoint format."""

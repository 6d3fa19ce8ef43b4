"""Quantization: formats, calibration with ModelOpt, and the accuracy report."""

"""Quantization at conversion: which format a layer gets, what calibration says of it, and rows in that format."""

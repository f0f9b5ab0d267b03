"""What the ops mean (reference.py) and the kernels that compute them fast."""

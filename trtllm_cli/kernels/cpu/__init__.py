"""The cpu backend's native kernels: C++ that is compiled when an engine is built, and loaded through ctypes to run it.

`compiler.py` makes the shared library, `pack.py` lays weights out for it (both at build time), and `library.py` loads
it, builds its steps and runs them; `library.py` imports no torch.
"""

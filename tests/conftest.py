"""Triton's kernels run in its interpreter here; what compiles them does so in processes of its own."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

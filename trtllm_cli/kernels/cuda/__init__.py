"""GPU kernels, compiled ahead of time: what one is, the compiler, and the driver that runs them."""

"""Device code: find the compiler, build kernels, keep them."""

from epv2_plugin.jit.kernels import KERNELS, Kernel, args_type

__all__ = ["KERNELS", "Kernel", "args_type"]

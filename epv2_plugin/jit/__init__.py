"""Device code: find the compiler, build kernels, keep them."""

from epv2_plugin.jit.args import HeaderError
from epv2_plugin.jit.compiler import Built, CacheError, CompileError, Resources, build, cache_folder, device_arch
from epv2_plugin.jit.kernels import KERNELS, Kernel, args_type
from epv2_plugin.jit.toolchain import ToolchainError

__all__ = [
    "KERNELS",
    "Built",
    "CacheError",
    "CompileError",
    "HeaderError",
    "Kernel",
    "Resources",
    "ToolchainError",
    "args_type",
    "build",
    "cache_folder",
    "device_arch",
]

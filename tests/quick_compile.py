"""XLA_FLAGS for small programs, which take far longer to compile than to run."""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # XLA ends the process on a flag that it does not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

"""The GPU: kernels in Triton, which a CUDA device runs, and a CPU under Triton's interpreter."""

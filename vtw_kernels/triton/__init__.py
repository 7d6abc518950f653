"""The kernels in Triton: what runs where the CUDA build is missing, ROCm included."""

"""The kernels in Triton, for GPUs where the CUDA build is missing, ROCm included. They have been interpreted on a CPU
and compiled for GPUs; none has run on one yet."""

"""Checks of the GPU's kernels: cuda_check without a GPU, gpu_check on one."""

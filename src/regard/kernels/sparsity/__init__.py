"""Kernels of site `sparsity`."""

"""Triton kernels, one file per op, over torch and triton only; installed as bagssl_fast.kernels."""

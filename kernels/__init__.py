"""Triton kernels, one file per op. Installed as `bagssl_fast.kernels`; imports torch and triton only."""

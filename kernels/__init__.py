"""Triton kernels, one file for each op; installed as ``alterrec_fast.kernels``."""

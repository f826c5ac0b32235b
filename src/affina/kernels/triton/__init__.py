"""Triton kernels, one file per operation; imported only where `affina.kernels.dispatch.use_triton` says so."""

"""Triton kernels: same site as the op they speed up. Imported only when a call is sent to them."""

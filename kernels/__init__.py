"""Attention over paged KV on CPU and GPU, its plain-PyTorch reference, and the pinned thread pool."""

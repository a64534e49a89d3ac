"""Benchmarks of HybridGen, and the training of the small model that ships with it."""

"""Kernels in Triton; their backends import them when they are first used."""

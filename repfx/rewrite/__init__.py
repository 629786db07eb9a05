"""Rewriting graphs: kernels of regions, merges, their proofs, and the contract of a pass."""

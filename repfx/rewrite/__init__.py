"""What is done to a graph: kernels of regions, merges, proofs, and the contract of a pass."""

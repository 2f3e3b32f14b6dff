"""Parts of the benchmarks of the distributed layer."""

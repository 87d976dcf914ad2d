"""The benchmarks that can be named, one file each; its name is the benchmark's."""

"""Benchmarks of eptc: `make bench`. See README.md in this folder."""

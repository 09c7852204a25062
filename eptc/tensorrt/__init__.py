"""Engines for TensorRT: what its parser takes, the shapes to build for, and built engines."""

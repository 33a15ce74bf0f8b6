"""Measurements of speed, each as a module to run, such as `python -m benchmarks.affine`. Not part of the package."""

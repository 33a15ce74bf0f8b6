"""What takes how long, against what the machine can do. Not part of the package: `python -m benchmarks.affine`."""

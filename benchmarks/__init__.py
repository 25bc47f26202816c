"""Benchmarks of densegrad; each is a module to run: `python -m benchmarks.NAME --help`, from the project's root."""

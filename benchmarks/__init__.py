"""Measurements of the library: what it costs and what it gains. Installed as `defense.benchmarks`."""

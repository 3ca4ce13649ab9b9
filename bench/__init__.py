"""Benchmarks of coordatt_fast.

``python -m bench.throughput --help`` (the main job), ``python -m pytest bench/micro`` (one suite per pass).
"""

"""The benchmark for GPUs: ``python -m bench.gpu --help``."""

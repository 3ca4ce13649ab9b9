"""pytest-benchmark suites, one per pass and the whole module: ``python -m pytest bench/micro``.

They time coordatt_fast against itself (before and after a change: ``--benchmark-autosave``,
``--benchmark-compare``) and next to the published module. No test fails on a time; one fails only when its
result is wrong.
"""

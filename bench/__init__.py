"""Benchmarks of dynquant; `python -m bench --help` lists what can be done, README.md says what it means."""

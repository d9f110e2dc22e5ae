"""Runs PEFT's own test suite with SVF rows: `python tests/peft_suite/run.py`. Nothing here is collected by pytest."""

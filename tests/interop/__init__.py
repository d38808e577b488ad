"""Checks of our exports against the engines that load them, each in a virtual environment: `make interop`.

These are programs; pytest collects only test_compare_engines.py.
"""

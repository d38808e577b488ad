"""Heads from elsewhere, and heads for elsewhere: `importing.import_head`, `exporting.export_head`.

A module for each architecture has its formats; `formats` has the parts that they share.
"""

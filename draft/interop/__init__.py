"""Heads from elsewhere, and heads for elsewhere: `importing.import_head`, `exporting.export_head`.

The formats of each architecture are in the `*_sources` and `*_formats` modules, and in `draft.heads.registry`'s table.
"""

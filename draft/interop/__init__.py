"""Heads from elsewhere, and heads for elsewhere: `import_head` reads other formats, `export_head` writes them."""

from draft.interop.exporting import FORMATS, export_head
from draft.interop.importing import import_head

__all__ = ["FORMATS", "export_head", "import_head"]

"""Our exports against the real packages that load them; each runs in a virtual environment of its own."""

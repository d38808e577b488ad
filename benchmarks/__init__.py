"""Programs that measure Draftsmith; each prints a table, writes JSON and draws a PNG."""

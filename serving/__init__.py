"""Everything that runs a draft head next to its target."""

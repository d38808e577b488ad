"""The loop of a server that learns: captured traffic, an adapted head, its comparison, and the swap."""

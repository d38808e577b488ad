"""Train, adapt and judge draft heads for speculative decoding."""

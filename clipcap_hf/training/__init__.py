"""Training captioners: what `clipcap train` does, and the pieces for scripts of your own."""

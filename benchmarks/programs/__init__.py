"""Norms of all libraries, the measured cases, and whole training steps."""

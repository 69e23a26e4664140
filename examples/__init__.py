"""Runnable examples; `segflow demo` runs `digits`."""

"""Curvature at checkpoints: its mathematics, the passes that fit it, and what was fitted, as the query side reads it.

Engine room: users import nothing from here. `kronecker` and `preconditioner` are pure mathematics.
"""

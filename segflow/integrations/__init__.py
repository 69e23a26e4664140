"""Bridges to trainers and libraries that users already have: each is imported by its own name.

Engine room: `segflow.integrations.transformers` needs transformers, `segflow.integrations.lightning` Lightning.
"""

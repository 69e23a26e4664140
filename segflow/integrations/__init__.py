"""Bridges to trainers and libraries that users already have.

Engine room: nothing is here yet.
"""

"""Datasets as batches of chosen examples, and fingerprints that tell datasets, tasks and functions apart.

Engine room: users import nothing from here.
"""

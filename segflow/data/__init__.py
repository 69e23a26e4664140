"""Datasets as batches of chosen examples, and digests that tell datasets, tasks and functions apart.

Engine room: users import nothing from here.
"""

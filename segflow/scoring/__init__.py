"""Queries meet groups: the walk over a plan, query gradients under operators, summed training gradients.

Engine room: users import nothing from here.
"""

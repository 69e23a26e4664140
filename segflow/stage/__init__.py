"""What all work on one stage of training shares, and what the stage's units are made of.

Engine room: users import nothing from here.
"""

"""The model as seen through one of its task's losses: its layers, and the tokens that one backward hands out.

Engine room: users import nothing from here.
"""

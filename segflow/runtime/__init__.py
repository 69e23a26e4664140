"""Processes and the terminal: ranks and their collectives, which rank failed, progress bars, peak memory, signals.

Engine room: users import nothing from here. Only this room talks to accelerate and torch.distributed.
"""

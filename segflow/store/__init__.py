"""What is kept on disk: files written whole or not at all, the store of units, its lock, its journal, its maintenance.

Engine room: users import nothing from here. Only this room writes for the engine.
"""

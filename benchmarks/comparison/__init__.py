"""What the official launcher and client do, and what this library does, in the same trials.

Speed has its own command (``python -m benchmarks``); here it is about behaviour: what is
told, how long something takes to end, and what is left behind.
"""

"""The numerical operations behind the Suppressor.

`reference.py` defines what is correct.
"""

"""Alignment metrics, exact for any batch size and number of processes, and their catalogue.

The catalogue is read without torch, so this module does not import anything.
"""

"""Alignment metrics: torchmetrics that are exact for any batch size and number of processes, and their catalogue.

The catalogue is read without torch, so nothing is imported here.
"""

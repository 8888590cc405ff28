"""The experiments of arXiv 2505.18069 as commands: cells, tables, figures, and a report.

An experiment is a list of cells (`cells.py`) and a summary of their results (`report.py`).
"""

"""Scores for captions and answers, the readers of their benchmarks, and the numbers that the paper
printed.
"""

"""Rules that read one short answer each: yes/no, numbers, colours, places, directions, choices,
comparisons.

Each module has `read` functions (text -> value, None where the text does not commit itself) and one `judge`
(-> "correct", "wrong" or None for undecided). `evaluation.vqa` picks the rule.
"""

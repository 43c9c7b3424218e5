"""Decoding shows what a drafter is worth: the tokens that its target need not write one by one.

Here are the speculative loop, generation of text and of answers, and the evaluation of a drafter.
"""

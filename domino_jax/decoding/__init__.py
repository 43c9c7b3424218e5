"""Decoding: the speculative loop, generation of text and answers, evaluation of a drafter."""

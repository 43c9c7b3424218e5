"""A page with pictures from the files of runs: does the drafter pay?

sources    the files of runs; every value with its place in them
cells      figures as text that knows where it came from
verdict    tau against break-even and the floor, in a sentence
tables     a column for each run
charts     what is drawn: numbers, taken from the files
pictures   how it is drawn
notes      warnings, decoded answers, what was left out and why
document   the sections in their order, written
"""

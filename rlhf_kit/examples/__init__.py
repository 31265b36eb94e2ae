"""A data card's rows in their canonical form, split, counted and hashed.

Every row of the files is either kept or dropped for a reason that is counted. What is wrong with a file (cut off, not
JSON, without a column) is an error always; what is wrong with a row (nothing in a cell, equal answers) is an error with
file and line, or a counted drop where the card says `on_problem: drop`. Where several rows of a file make one of ours
(votes on a pair, completions of a prompt), the others are counted as merged.
"""

"""`tandem doctor`: what on this cluster would make a job fail, or go wrong without a word.

Probes look on each node and return plain data (facts.py), a pure judge finds what is wrong with it (judge.py), and a
pure renderer shows it (table.py). examine.py asks the nodes; quick.py is the part that runs before a job on several.
"""

"""The storm: faults at random, from a seed, while a producer goes on; then a proof of what was delivered.

`python -m tests.chaos --help`. `plan.py` draws the faults from the seed before anything starts, `injector.py` does
them, `verdict.py` holds what handlers did against what the producer had acknowledged.
"""

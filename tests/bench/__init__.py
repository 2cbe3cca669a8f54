"""The benchmark: kafkasrcd beside the loops people write by hand, on the same broker in the same run.

`python -m tests.bench --help`; `rows.py` lists what is measured.
"""

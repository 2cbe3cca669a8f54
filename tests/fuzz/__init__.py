"""Coverage-guided fuzzing of everything that reads bytes: `make fuzz`, and briefly in `tests/test_fuzz.py`.

A target takes any bytes. It returns, or what it raises is a finding; the end of its process is one, too.
"""

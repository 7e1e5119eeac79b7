# The recipe's ladder, first row: half of the baseline's layers.
base = "base.py"

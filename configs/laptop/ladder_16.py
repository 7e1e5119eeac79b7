# The recipe's ladder, first row: half of the baseline's layers, at its width, so half of its parameters; the paper's has
# as many parameters as its baseline.
base = "base.py"

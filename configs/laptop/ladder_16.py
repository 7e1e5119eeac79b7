# The recipe's ladder, first row: L = 8 stands for the paper's 16. It has the width of the second
# row, so half of its parameters. Neither the width nor the size of the paper's is stated.
base = "base.py"

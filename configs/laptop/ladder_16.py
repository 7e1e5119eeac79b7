# The recipe's ladder, first row: half of the layers of the second at its width, so half of its parameters. Neither the
# width nor the size of the paper's is stated.
base = "base.py"

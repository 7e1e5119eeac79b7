# The recipe's ladder, first row: L = 8 stands for the paper's 16. The model is as wide as that of
# the second row, so it has about half as many parameters. The paper states neither its width nor
# its size.
base = "base.py"

# The recipe's ladder, first row: L = 8 stands for the paper's 16. It is as wide as the
# second row, so it has half as many parameters. The paper states neither its width nor its size.
base = "base.py"

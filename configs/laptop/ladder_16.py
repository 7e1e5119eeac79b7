# The recipe's ladder, first row: L = 8 stands for the paper's 16. It is as wide as the second row, so it has half of
# the parameters. The paper does not state the width or the size of this row.
base = "base.py"

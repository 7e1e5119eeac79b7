# The recipe's ladder, first row: L = 16. Its width is not stated: the dense 1B's, our choice.
base = "base.py"

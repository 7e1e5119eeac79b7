# The recipe's baseline. The steps below it each start from the last one that helped the paper.
base = "base.py"
n_layer = 16

# The recipe's baseline: L = 16 stands for the paper's 32. The steps below it each start from the
# last one that helped the paper.
base = "base.py"
n_layer = 16

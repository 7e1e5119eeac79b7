# The recipe's baseline: L = 16 stands for the paper's 32. Each later step of the ladder
# starts from the last step that helped in the paper.
base = "base.py"
n_layer = 16

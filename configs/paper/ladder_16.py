# The recipe's ladder, first row: L = 16. Its width is not stated: the dense 1B's, our choice.
base = "base.py"
tokens_per_step = 2**21     # our choice: the batch of these runs is not stated

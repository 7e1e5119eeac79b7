# The recipe's ladder, first row: L = 16. The width is not stated; that of the dense 1B model is our choice.
base = "base.py"
tokens_per_step = 2**21     # our choice: the batch of these runs is not stated

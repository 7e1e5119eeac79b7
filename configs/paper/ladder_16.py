# The recipe's ladder, first row: L = 16. The paper does not state the width. We choose that of the
# dense 1B model.
base = "base.py"
tokens_per_step = 2**21     # our choice: the batch of these runs is not stated

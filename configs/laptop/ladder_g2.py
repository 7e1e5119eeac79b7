# The ladder: + G = 2 query heads per key/value head, as in the paper.
base = "ladder_decay_0_3.py"
n_kv_head = 2

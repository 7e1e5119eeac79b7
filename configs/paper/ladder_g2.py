# The ladder: + two query heads per key/value head.
base = "ladder_decay_0_3.py"
n_kv_head = 8               # G = 2

# A deep and narrow model with grouped-query attention: 16 layers, four query heads on one key/value head (G = 4).
# The paper's setting for the curse of depth, at laptop size: two to five minutes on two cores.
base = "dense.py"
n_layer = 16
n_kv_head = 1

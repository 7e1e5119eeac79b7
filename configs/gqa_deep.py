# A deep, narrow model with grouped-query attention: 16 layers, four query heads that share one
# key/value head (G = 4). Training takes two to five minutes on two cores.
base = "dense.py"
n_layer = 16
n_kv_head = 1

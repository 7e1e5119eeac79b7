# Dense, the counterpart of moe_400m.py: d = 32 stands for the paper's 768. The FFN is as wide as
# the experts that a token uses in moe_400m.py, taken together.
base = "base.py"
n_embd = 32
ffn_hidden = 320
init_std = 0.16             # 0.02 * sqrt(2048 / 32)

# Dense 400M, the counterpart of moe_400m.py: its width, depth and active FFN.
base = "base.py"
n_head = 12
n_embd = 768
ffn_hidden = 7680           # our choice: 5 x 1536, as a token uses in moe_400m.py; 398M parameters

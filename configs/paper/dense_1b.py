# Dense 1B, the counterpart of moe_1b.py.
base = "base.py"

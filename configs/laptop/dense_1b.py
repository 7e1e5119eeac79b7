# Dense, the counterpart of moe_1b.py.
base = "base.py"
